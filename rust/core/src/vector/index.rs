//! The index itself: configuration, the published state, the lock of the writers.
#![forbid(unsafe_code)]

use std::ops::{Deref, DerefMut};
use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
use std::sync::{Arc, LockResult, Mutex, MutexGuard, TryLockError};
use std::time::Duration;

use arc_swap::ArcSwap;

use super::calibrate::Calibration;
use super::error::{Result, VectorError};
use super::ids::IdTable;
use super::metric::Metric;
use super::regroup::Runs;
use super::state::State;
use crate::arena::{PageStore, StoreOptions};
use crate::forest::Forest;
use crate::layout::{Dtype, Packing, PageLayout};

/// Memory is reserved this much at a time: many indexes are small.
const SLAB_BYTES: usize = 1 << 20;
/// Milliseconds for which a forked process looks whether the lock of the writers is held by a thread of its own.
const PATIENCE_MS: usize = 100;

/// What an index is made for; fixed for its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VectorConfig {
    /// Length of a vector, 1..=65536.
    pub dim: usize,
    /// How closeness is measured.
    pub metric: Metric,
    /// How rows are stored.
    pub dtype: Dtype,
    /// Subtract the mean of the first 1024 or more vectors from all.
    pub center: bool,
    /// Which rows stand for a set when a bulk addition is ordered.
    pub seed: u64,
    /// Keep 4-bit codes of the rows where they pay: searches are faster, an index larger by up to 32 bytes a row.
    pub codes: bool,
}

impl VectorConfig {
    /// The storage type of that name: `float32`, `float16`, `bfloat16` or `int8`.
    ///
    /// # Errors
    /// If there is none.
    pub fn dtype_from_name(name: &str) -> Result<Dtype> {
        let known = [Dtype::F32, Dtype::F16, Dtype::Bf16, Dtype::I8];
        let expected = "'float32', 'float16', 'bfloat16' or 'int8'";
        let found = known.into_iter().find(|dtype| dtype.name() == name);
        found.ok_or_else(|| VectorError::argument("dtype", expected, &format!("'{name}'")))
    }

    /// # Errors
    /// If `dim` is out of range.
    pub(super) fn check(&self) -> Result<()> {
        match PageLayout::new(self.dtype, self.dim, 0) {
            Ok(_) => Ok(()),
            Err(_) => Err(VectorError::argument("dim", "1..=65536", &self.dim)),
        }
    }

    pub(super) fn new_forest(&self) -> Result<Forest> {
        let options = StoreOptions { slab_bytes: SLAB_BYTES, ..StoreOptions::default() };
        // Measured, 10 nearest of 64 pages: keys of attention .94 by product, .81 by distance; a Gaussian mixture .80, .83.
        let packing = if self.metric == Metric::InnerProduct { Packing::Product } else { Packing::Distance };
        let layout = PageLayout::new(self.dtype, self.dim, 0)?;
        // Its codes are others: of four bits, from books made for its vectors.
        let store = PageStore::new(layout.packed_by(packing).without_codes(), options);
        Ok(Forest::new(store?, 1)?)
    }
}

/// What to do with an id that is already there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnConflict {
    /// Refuse the whole call.
    Error,
    /// The later vector wins.
    Replace,
    /// The earlier vector stays.
    Skip,
}

impl OnConflict {
    /// The rule of that name.
    ///
    /// # Errors
    /// If there is none.
    pub fn from_name(name: &str) -> Result<Self> {
        match name {
            "error" => Ok(Self::Error),
            "replace" => Ok(Self::Replace),
            "skip" => Ok(Self::Skip),
            _ => Err(VectorError::argument("on_conflict", "'error', 'replace' or 'skip'", &format!("'{name}'"))),
        }
    }
}

/// A dynamic index of vectors with ids; see the module for how it works and [`VectorIndex::search`] for what it
/// promises.
///
/// Whatever only reads takes the published state and waits for nobody. Writers hold the forest's lock: they prepare a
/// new state on the forest, which readers do not look at, and publish it with one swap.
#[derive(Debug)]
pub struct VectorIndex {
    pub(super) config: VectorConfig,
    /// `None` for a read-only index.
    writer: Option<Writer>,
    state: ArcSwap<State>,
}

impl VectorIndex {
    /// An empty index.
    ///
    /// # Errors
    /// If `dim` is out of range.
    pub fn new(config: VectorConfig) -> Result<Self> {
        config.check()?;
        let forest = config.new_forest()?;
        let state = State::empty(config, &forest);
        Ok(Self::from_parts(config, Some(forest), state))
    }

    /// An index that publishes `state`; without a forest it is read-only.
    pub(super) fn from_parts(config: VectorConfig, forest: Option<Forest>, state: State) -> Self {
        Self { config, writer: forest.map(Writer::new), state: ArcSwap::from_pointee(state) }
    }

    /// What it was made for.
    #[must_use]
    pub fn config(&self) -> VectorConfig {
        self.config
    }

    /// Whether it is a snapshot or a mapped file.
    #[must_use]
    pub fn is_read_only(&self) -> bool {
        self.writer.is_none()
    }

    /// Vectors in the index. Wait-free.
    #[must_use]
    pub fn len(&self) -> usize {
        self.state.load().n_live
    }

    /// Whether there is no vector. Wait-free.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The state after some completed write. Wait-free but for a rare slow path of `arc-swap`.
    pub(super) fn state(&self) -> Arc<State> {
        self.state.load_full()
    }

    /// The read-only index of this moment; it shares everything and stays as it is. Wait-free, O(1).
    #[must_use]
    pub fn snapshot(&self) -> Self {
        Self { config: self.config, writer: None, state: ArcSwap::new(self.state()) }
    }

    /// An index with the same content that can be written to; neither sees later changes of the other. Pages are
    /// shared. Waits for nobody.
    #[must_use]
    pub fn copy(&self) -> Self {
        let state = self.state();
        let forest = state.fork();
        let view = forest.heads()[0].view();
        let (ids, calibration) = (Arc::new(state.ids.duplicate()), Arc::new(state.calibration.duplicate()));
        Self::from_parts(self.config, Some(forest), State { view, ids, calibration, ..State::clone(&state) })
    }

    /// The forest, for the one writer. Blocking.
    pub(super) fn lock_writer(&self) -> Result<Writing<'_>> {
        let writer = self.writer.as_ref().ok_or(VectorError::ReadOnly)?;
        // Relaxed: only this thread writes its own mark, so the comparison is exact.
        if writer.thread.load(Ordering::Relaxed) == thread_mark() {
            return Err(VectorError::Reentrant);
        }
        let forest = writer.lock()?.unwrap_or_else(|poisoned| {
            // A writer panicked on its way to a state that it never published.
            let mut forest = poisoned.into_inner();
            *forest = self.state().fork();
            writer.forest.clear_poison();
            forest
        });
        writer.thread.store(thread_mark(), Ordering::Relaxed);
        Ok(Writing { forest, thread: &writer.thread })
    }

    pub(super) fn publish(&self, state: State) {
        self.state.store(Arc::new(state));
    }
}

/// The tree that grows. Shows the same rows as the published state while nobody holds it.
#[derive(Debug)]
struct Writer {
    forest: Mutex<Forest>,
    /// Mark of the thread that holds the lock; 0 for none.
    thread: AtomicUsize,
    /// The process whose threads take the lock. A fork copies the lock as it is, but only one thread.
    process: AtomicU32,
}

impl Writer {
    fn new(forest: Forest) -> Self {
        let process = AtomicU32::new(std::process::id());
        Self { forest: Mutex::new(forest), thread: AtomicUsize::new(0), process }
    }

    /// Takes the lock. In a process that was forked from the one that used it last, its holder may not exist: then an error
    /// instead of waiting for ever.
    fn lock(&self) -> Result<LockResult<MutexGuard<'_, Forest>>> {
        let process = std::process::id();
        for _ in 0..PATIENCE_MS {
            // Relaxed: only threads of this process ever store this number, and the lock orders all else.
            if self.process.load(Ordering::Relaxed) == process {
                return Ok(self.forest.lock());
            }
            let taken = match self.forest.try_lock() {
                Ok(forest) => Ok(forest),
                Err(TryLockError::Poisoned(poisoned)) => Err(poisoned),
                Err(TryLockError::WouldBlock) => {
                    std::thread::sleep(Duration::from_millis(1));
                    continue;
                }
            };
            // Relaxed: as above.
            self.process.store(process, Ordering::Relaxed);
            return Ok(taken);
        }
        Err(VectorError::Forked)
    }
}

/// The forest while its writer holds it.
#[derive(Debug)]
pub(super) struct Writing<'a> {
    forest: MutexGuard<'a, Forest>,
    thread: &'a AtomicUsize,
}

impl Deref for Writing<'_> {
    type Target = Forest;

    fn deref(&self) -> &Forest {
        &self.forest
    }
}

impl DerefMut for Writing<'_> {
    fn deref_mut(&mut self) -> &mut Forest {
        &mut self.forest
    }
}

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        // Relaxed: see `lock_writer`.
        self.thread.store(0, Ordering::Relaxed);
    }
}

/// A number of its own for each living thread.
fn thread_mark() -> usize {
    thread_local!(static MARK: u8 = const { 0 });
    MARK.with(|mark| std::ptr::from_ref(mark) as usize)
}

impl State {
    /// The state of an index without a row.
    pub(super) fn empty(config: VectorConfig, forest: &Forest) -> Self {
        Self {
            mean: vec![0.0; config.dim].into(),
            centred: false,
            store: Arc::clone(forest.store()),
            view: forest.heads()[0].view(),
            blocks: Vec::new(),
            codes: None,
            n_live: 0,
            ids: Arc::new(IdTable::with_room(0, 0..0)),
            next_id: 0,
            calibration: Arc::new(Calibration::default()),
            runs: Runs::default(),
            compactions: 0,
        }
    }

    /// A forest with the rows of this state, for a writer to go on from.
    pub(super) fn fork(&self) -> Forest {
        Forest::of_view(Arc::clone(&self.store), crate::config::Sealing::default(), &self.view)
    }
}
