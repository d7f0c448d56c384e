//! One piece of memory from the system, zeroed and aligned to 2 MiB.

use std::ptr::NonNull;

use rayon::ThreadPool;
use rayon::prelude::*;

/// Alignment: a huge page of x86 and of most ARM systems.
const HUGE: usize = 2 << 20;
/// Smallest page of the supported systems; one byte of each is written to make it exist.
const SMALL: usize = 4096;

/// Anonymous memory, unmapped when dropped.
#[derive(Debug)]
pub(crate) struct Region {
    map: NonNull<u8>,
    map_bytes: usize,
    start: NonNull<u8>,
    bytes: usize,
}

// SAFETY: the memory is plain bytes; who may touch which part is decided by the owner's users, not by threads.
unsafe impl Send for Region {}
// SAFETY: as above.
unsafe impl Sync for Region {}

impl Region {
    /// Address space for `bytes` bytes; memory is committed as it is touched.
    ///
    /// # Errors
    /// What the system said.
    pub(crate) fn map(bytes: usize) -> std::io::Result<Self> {
        let bytes = bytes.next_multiple_of(SMALL);
        let map_bytes = bytes + HUGE;
        let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new anonymous mapping; nothing existing is replaced.
        let map = unsafe { libc::mmap(std::ptr::null_mut(), map_bytes, protection, flags, -1, 0) };
        if map == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        let map = NonNull::new(map.cast::<u8>()).ok_or_else(|| std::io::Error::other("mmap returned null"))?;
        let distance = map.as_ptr().addr().next_multiple_of(HUGE) - map.as_ptr().addr();
        // SAFETY: `distance < HUGE`, and the mapping is larger than `bytes` by `HUGE`.
        let start = unsafe { map.add(distance) };
        Ok(Self { map, map_bytes, start, bytes })
    }

    /// Asks for huge pages; a hint that the system may ignore.
    #[cfg(target_os = "linux")]
    pub(crate) fn advise_huge(&self) {
        if self.bytes >= HUGE {
            // SAFETY: the range is our own mapping.
            unsafe { libc::madvise(self.start.as_ptr().cast(), self.bytes, libc::MADV_HUGEPAGE) };
        }
    }

    #[cfg(not(target_os = "linux"))]
    pub(crate) fn advise_huge(&self) {}

    /// Commits the memory now, spread over the threads of `pool`: it lands on the NUMA nodes they run on.
    pub(crate) fn touch(&self, pool: Option<&ThreadPool>) {
        let touch = |chunk: usize| {
            for offset in (chunk * HUGE..((chunk + 1) * HUGE).min(self.bytes)).step_by(SMALL) {
                // SAFETY: `offset` is below `bytes`.
                let byte = unsafe { self.start.add(offset) };
                // SAFETY: the memory is ours and nobody else knows it yet; volatile, so that the write happens.
                unsafe { byte.write_volatile(0) };
            }
        };
        let chunks = 0..self.bytes.div_ceil(HUGE);
        match pool {
            Some(pool) if chunks.len() > 1 => pool.install(|| chunks.into_par_iter().for_each(touch)),
            _ => chunks.for_each(touch),
        }
    }

    pub(crate) fn start(&self) -> NonNull<u8> {
        self.start
    }

    pub(crate) fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        // SAFETY: `map` is our own mapping of that length, and its users are gone.
        unsafe { libc::munmap(self.map.as_ptr().cast(), self.map_bytes) };
    }
}
