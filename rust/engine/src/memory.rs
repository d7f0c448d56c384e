//! Host memory of one runtime: page-locked where a device is to read it, within a limit, given back when dropped.

use std::alloc::Layout;
use std::collections::HashMap;
use std::ptr::NonNull;
use std::time::{Duration, Instant};

use icecache_core::{Error, Result, SlabAllocator};
use rayon::ThreadPool;

use crate::cuda::CudaRegistrar;
use crate::region::Region;
use crate::registrar::Registrar;
use crate::sync::{Arc, Mutex, lock};

/// Whether memory is page-locked.
#[derive(Debug, Clone, Default)]
pub enum Pin {
    /// Never: there is no device.
    #[default]
    Never,
    /// With CUDA device `0`, or pageable when that fails; [`HostMemory::fallback_reason`] then says why.
    Prefer(usize),
    /// With this CUDA device, or an error.
    Require(usize),
    /// With the given registrar; `required`: or an error.
    With {
        /// Who registers.
        registrar: Arc<dyn Registrar>,
        /// Whether pageable memory is refused.
        required: bool,
    },
}

/// Options of a [`HostMemory`].
#[derive(Debug, Clone, Default)]
pub struct MemoryOptions {
    /// Most bytes held at a time; `None` for what the machine has.
    pub limit_bytes: Option<usize>,
    /// Whether and how it is page-locked.
    pub pin: Pin,
}

/// Source of memory. Cloning shares it.
#[derive(Debug, Clone)]
pub struct HostMemory(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    limit_bytes: Option<usize>,
    registrar: Option<Arc<dyn Registrar>>,
    required: bool,
    pool: Option<Arc<ThreadPool>>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    reserved_bytes: usize,
    pinned_bytes: usize,
    /// Bytes on loan that are not page-locked. Not what is missing from `pinned_bytes`: memory that is being page-locked
    /// just now, beside a step, is nobody's yet.
    pageable_bytes: usize,
    pin_time: Duration,
    fallback: Option<String>,
    /// Slabs handed out through [`SlabAllocator`].
    slabs: HashMap<usize, Block>,
}

/// Memory on loan from a [`HostMemory`]: plain bytes, zeroed when it was lent.
#[derive(Debug)]
pub struct Block {
    region: Region,
    pinned: bool,
    memory: Arc<Shared>,
}

impl Block {
    /// First byte, aligned to 2 MiB; valid as long as the block. Who may touch which part is up to its users.
    #[must_use]
    pub fn start(&self) -> NonNull<u8> {
        self.region.start()
    }

    /// How many bytes there are: what was asked for, rounded up to 4096.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.region.bytes()
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        if self.pinned
            && let Some(registrar) = &self.memory.registrar
        {
            registrar.unregister(self.region.start());
        }
        let mut state = lock(&self.memory.state);
        state.reserved_bytes -= self.region.bytes();
        let kind = if self.pinned { &mut state.pinned_bytes } else { &mut state.pageable_bytes };
        *kind -= self.region.bytes();
    }
}

impl HostMemory {
    /// A source that has handed out nothing yet. `pool` spreads the first touch of large pieces over its threads.
    ///
    /// # Errors
    /// If page-locking is required and there is no device that allows it.
    pub fn new(options: MemoryOptions, pool: Option<Arc<ThreadPool>>) -> Result<Self> {
        let mut fallback = None;
        let (registrar, required): (Option<Arc<dyn Registrar>>, bool) = match options.pin {
            Pin::Never => (None, false),
            Pin::With { registrar, required } => (Some(registrar), required),
            Pin::Prefer(device) => match CudaRegistrar::new(device) {
                Ok(registrar) => (Some(Arc::new(registrar)), false),
                Err(reason) => {
                    fallback = Some(reason);
                    (None, false)
                }
            },
            Pin::Require(device) => match CudaRegistrar::new(device) {
                Ok(registrar) => (Some(Arc::new(registrar)), true),
                Err(received) => {
                    return Err(Error::Option { name: "pin", expected: "a CUDA device that can pin memory", received });
                }
            },
        };
        let state = Mutex::new(State { fallback, ..State::default() });
        Ok(Self(Arc::new(Shared { limit_bytes: options.limit_bytes, registrar, required, pool, state })))
    }

    /// Bytes held now, mailboxes included.
    #[must_use]
    pub fn reserved_bytes(&self) -> usize {
        lock(&self.0.state).reserved_bytes
    }

    /// Bytes of them that are page-locked.
    #[must_use]
    pub fn pinned_bytes(&self) -> usize {
        lock(&self.0.state).pinned_bytes
    }

    /// Time spent on committing and page-locking so far.
    #[must_use]
    pub fn pin_time(&self) -> Duration {
        lock(&self.0.state).pin_time
    }

    /// Whether a device can read everything on loan now.
    #[must_use]
    pub fn is_pinned(&self) -> bool {
        self.0.registrar.is_some() && lock(&self.0.state).pageable_bytes == 0
    }

    /// Why memory that should have been page-locked is not, the first time that happened.
    #[must_use]
    pub fn fallback_reason(&self) -> Option<String> {
        lock(&self.0.state).fallback.clone()
    }

    /// Zeroed memory, committed and page-locked according to the options.
    ///
    /// # Errors
    /// If the limit or the machine leaves no room, or it has to be page-locked and cannot.
    pub fn allocate(&self, bytes: usize) -> Result<Block> {
        let shared = &self.0;
        self.account(bytes)?;
        let started = Instant::now();
        let give_up = |needed: usize, reason: String| {
            lock(&shared.state).reserved_bytes -= needed;
            Error::HostMemory { needed, available: available_bytes().unwrap_or(0), reason }
        };
        let rounded = bytes.next_multiple_of(4096);
        let region = Region::map(bytes).map_err(|error| give_up(rounded, format!("the system: {error}")))?;
        let mut pinned = false;
        region.advise_huge();
        if let Some(registrar) = &shared.registrar {
            region.touch(shared.pool.as_deref());
            match registrar.register(region.start(), region.bytes()) {
                Ok(()) => pinned = true,
                Err(reason) if shared.required => {
                    let remedy = "page-locking failed; lower the limit or use pageable memory";
                    return Err(give_up(rounded, format!("{remedy}: {reason}")));
                }
                Err(reason) => {
                    lock(&shared.state).fallback.get_or_insert(reason);
                }
            }
        }
        let mut state = lock(&shared.state);
        let kind = if pinned { &mut state.pinned_bytes } else { &mut state.pageable_bytes };
        *kind += rounded;
        state.pin_time += started.elapsed();
        drop(state);
        Ok(Block { region, pinned, memory: Arc::clone(shared) })
    }

    /// Books `bytes` bytes, or says what there is.
    fn account(&self, bytes: usize) -> Result<()> {
        let mut state = lock(&self.0.state);
        let needed = bytes.next_multiple_of(4096);
        let limit = self.0.limit_bytes.map_or(usize::MAX, |limit| limit - limit.min(state.reserved_bytes));
        if needed > limit {
            let reason = "the limit of host memory, see host_memory".to_owned();
            return Err(Error::HostMemory { needed, available: limit, reason });
        }
        // Memory is overcommitted: beyond what is available the system would end the process instead of refusing.
        if let Some(available) = available_bytes()
            && needed > available
        {
            let reason = "memory of this machine or its control group".to_owned();
            return Err(Error::HostMemory { needed, available, reason });
        }
        state.reserved_bytes += needed;
        Ok(())
    }
}

// SAFETY: a region is zeroed, at least as large as the layout, aligned to 2 MiB, and kept in `slabs` until it comes back.
unsafe impl SlabAllocator for HostMemory {
    fn allocate(&self, layout: Layout) -> Result<NonNull<u8>> {
        assert!(layout.align() <= 2 << 20, "slabs are aligned to 2 MiB at most");
        let block = Self::allocate(self, layout.size())?;
        let start = block.start();
        lock(&self.0.state).slabs.insert(start.as_ptr().addr(), block);
        Ok(start)
    }

    unsafe fn deallocate(&self, slab: NonNull<u8>, _layout: Layout) {
        let block = lock(&self.0.state).slabs.remove(&slab.as_ptr().addr());
        // Outside of the lock, which dropping takes.
        drop(block);
    }
}

/// Bytes that this process may still take, where the system tells.
pub(crate) fn available_bytes() -> Option<usize> {
    let machine = field("/proc/meminfo", "MemAvailable:").map(|kib| kib << 10);
    let limit = number("/sys/fs/cgroup/memory.max");
    let group = limit.and_then(|limit| {
        // What the group holds for files is given back when it is needed.
        let cached = field("/sys/fs/cgroup/memory.stat", "inactive_file ").unwrap_or(0);
        Some((limit + cached).saturating_sub(number("/sys/fs/cgroup/memory.current")?))
    });
    machine.into_iter().chain(group).min()
}

fn number(path: &str) -> Option<usize> {
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}

/// The number behind `name` in a file with a field per line.
fn field(path: &str, name: &str) -> Option<usize> {
    let text = std::fs::read_to_string(path).ok()?;
    let value = text.lines().find_map(|line| line.strip_prefix(name))?;
    value.split_whitespace().next()?.parse().ok()
}
