//! The current state of a forest, and how it is replaced.
//!
//! Every change is computed aside from a state that was loaded, and published by one compare-and-swap that succeeds only
//! if what it was computed from is still current. Nobody waits: who loses finds that somebody else got something done.
#![forbid(unsafe_code)]

use rayon::ThreadPool;

use crate::arena::PageStore;
use crate::cell::Cell;
use crate::config::Sealing;
use crate::error::Result;
use crate::grow::{Grown, Growth, grow};
use crate::pending::{OpenBlock, Pending};
use crate::plan::{Counts, How};
use crate::snapshot::View;
use crate::state::{PendingEntry, State, Trees};
use crate::sync::{Arc, AtomicBool, AtomicU64, Ordering};

/// Blocks that may wait before a thread routes one although another thread is at it.
const HELP_BLOCKS: usize = if cfg!(any(loom, feature = "stress")) { 3 } else { 8 };

/// What all handles of a forest share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) store: Arc<PageStore>,
    pub(crate) sealing: Sealing,
    /// Trees that the store provides for.
    foreseen: usize,
    state: Cell<State>,
    /// Set while somebody computes new trees: others then leave the work to it, unless too much waits. A courtesy that
    /// saves work done twice; nothing rests on it.
    writing: AtomicBool,
    inserts: AtomicU64,
    splits: AtomicU64,
    seals: AtomicU64,
}

/// Tells others that somebody computes new trees, until dropped.
#[derive(Debug)]
pub(crate) struct Writing<'a>(&'a AtomicBool);

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        // Acquire: pairs with the Release of whoever found this set and left; its block is found by the check after this.
        self.0.swap(false, Ordering::AcqRel);
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.store.provision.end(self.foreseen);
    }
}

impl Shared {
    /// The state of a new forest. `grows`: pages for its trees are had ready, should they seal aside.
    pub(crate) fn new(store: Arc<PageStore>, sealing: Sealing, state: State, grows: bool) -> Self {
        let foreseen = if grows && sealing.stretch().is_some() { state.trees.heads.len() } else { 0 };
        store.provision.begin(foreseen);
        Self {
            store,
            sealing,
            foreseen,
            state: Cell::new(state),
            writing: AtomicBool::new(false),
            inserts: AtomicU64::new(0),
            splits: AtomicU64::new(0),
            seals: AtomicU64::new(0),
        }
    }

    pub(crate) fn load(&self) -> Arc<State> {
        self.state.load()
    }

    /// Tokens now.
    pub(crate) fn tokens(&self) -> usize {
        self.state.with(State::tokens)
    }

    /// What a reader sees of all heads now: the same tokens of each.
    pub(crate) fn views(&self) -> impl ExactSizeIterator<Item = View> + use<> {
        let state = self.load();
        let tokens = state.tokens();
        (0..state.trees.heads.len()).map(move |head| View::new(Arc::clone(&state), head, tokens))
    }

    pub(crate) fn view(&self, head: usize) -> View {
        let state = self.load();
        let tokens = state.tokens();
        View::new(state, head, tokens)
    }

    /// Says that new trees are being computed; `None` when somebody else says so.
    pub(crate) fn begin(&self) -> Option<Writing<'_>> {
        // Release: pairs with the Acquire in the drop of `Writing`. Acquire: the earlier writer's means are seen.
        (!self.writing.swap(true, Ordering::AcqRel)).then_some(Writing(&self.writing))
    }

    /// Replaces the current state by what `new` makes of it, again while others are faster; `false` once `new` declines.
    pub(crate) fn update(&self, mut new: impl FnMut(&State) -> Option<State>) -> bool {
        loop {
            let current = self.load();
            let Some(new) = new(&current) else { return false };
            if self.state.replace(&current, Arc::new(new)) {
                return true;
            }
        }
    }

    /// Replaces trees that are still current and have nothing pending behind them; `false` otherwise.
    pub(crate) fn replace_trees(&self, old: &Arc<Trees>, new: &Arc<Trees>) -> bool {
        self.update(|current| {
            // No token can be added to the old state once it is closed.
            let unchanged = Arc::ptr_eq(&current.trees, old) && current.close() == old.tokens;
            unchanged.then(|| State { trees: Arc::clone(new), pending: Vec::new() })
        })
    }

    /// Puts a block behind everything there is.
    pub(crate) fn append(&self, block: &Arc<Pending>) {
        self.update(|current| Some(current.with_block(block)));
    }

    /// Makes sure that there is a block that takes inserts, or did a moment ago. `exhausted` takes none: it has ended,
    /// or threads that stall hold all its lanes.
    pub(crate) fn open_block(&self, exhausted: Option<&PendingEntry>) {
        let block = Arc::new(Pending::Open(OpenBlock::new()));
        self.update(|current| {
            let useless = |entry: &PendingEntry| {
                entry.is_ended() || exhausted.is_some_and(|old| Arc::ptr_eq(&old.block, &entry.block))
            };
            current.pending.last().is_none_or(useless).then(|| current.with_block(&block))
        });
    }

    /// Routes the first pending block into the trees if it has ended; `false` when there is none. Lock-free: should
    /// another thread be faster, its result is the same and counts.
    ///
    /// # Errors
    /// If the store has no room; the block stays where it is, in everybody's sight.
    pub(crate) fn step(&self, pool: Option<&ThreadPool>) -> Result<bool> {
        let state = self.load();
        let Some(entry) = state.first_ended() else { return Ok(false) };
        let block = &entry.block;
        let how = match **block {
            Pending::Open(_) => How::OneByOne,
            Pending::Bulk(_) => How::Together,
        };
        let rows = (0..state.trees.heads.len()).map(|head| block.rows(head, entry.n_tokens())).collect();
        let growth = Growth::new(self, Arc::clone(&state), rows, how);
        for grown in grow(pool, &[growth])? {
            let published = self.update(|current| {
                let unchanged = Arc::ptr_eq(&current.trees, &state.trees)
                    && current.pending.first().is_some_and(|first| Arc::ptr_eq(&first.block, block));
                let pending = || current.pending[1..].to_vec();
                unchanged.then(|| State { trees: Arc::clone(&grown.trees), pending: pending() })
            });
            if published {
                self.published(&grown);
            }
        }
        Ok(true)
    }

    /// Routes pending blocks that have ended, if nobody else does or too many wait. What the store has no room for
    /// stays pending.
    pub(crate) fn drain(&self, pool: Option<&ThreadPool>) {
        loop {
            let Some(writing) = self.begin() else {
                if self.state.with(|state| state.pending.len() >= HELP_BLOCKS) {
                    // An error means that the block stays pending.
                    let _ = self.step(pool);
                }
                return;
            };
            let mut routed = self.step(pool);
            while let Ok(true) = routed {
                routed = self.step(pool);
            }
            drop(writing);
            // A block may have ended meanwhile, whose thread left the work to us.
            if routed.is_err() || self.state.with(|state| state.first_ended().is_none()) {
                return;
            }
        }
    }

    /// Routes everything that is pending; returns a state in which nothing was, at some moment of the call. Lock-free.
    ///
    /// # Errors
    /// If the store has no room.
    pub(crate) fn settled(&self, pool: Option<&ThreadPool>) -> Result<Arc<State>> {
        loop {
            let state = self.load();
            if state.close() == state.trees.tokens {
                return Ok(state);
            }
            self.step(pool)?;
        }
    }

    /// Counts what happened, has the stretches packed that ended in it, and the pages made ready that come next.
    pub(crate) fn published(&self, grown: &Grown) {
        grown.packings.iter().for_each(|packing| self.store.background.submit(packing));
        if self.sealing.stretch().is_some() {
            self.store.foresee(grown.trees.tokens, self.sealing);
        }
        self.count(grown.counts);
    }

    /// Adds to what happened so far.
    pub(crate) fn count(&self, counts: Counts) {
        // Relaxed: statistics, they order nothing.
        self.inserts.fetch_add(counts.inserts, Ordering::Relaxed);
        self.splits.fetch_add(counts.splits, Ordering::Relaxed);
        self.seals.fetch_add(counts.seals, Ordering::Relaxed);
    }

    pub(crate) fn counts(&self) -> Counts {
        // Relaxed: as in `count`.
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counts { inserts: read(&self.inserts), splits: read(&self.splits), seals: read(&self.seals) }
    }
}

#[cfg(test)]
mod tests {
    use rayon::ThreadPoolBuilder;

    use crate::pending::{BLOCK_TOKENS, LANES, Pending};
    use crate::{Dtype, ExtendRow, Forest, PageLayout, PageStore, StoreOptions, extend};

    fn forest() -> Forest {
        let layout = PageLayout::new(Dtype::F32, 1, 0).unwrap();
        Forest::new(PageStore::new(layout, StoreOptions::default()).unwrap(), 1).unwrap()
    }

    fn keys(forest: &Forest) -> Vec<f32> {
        let mut keys = vec![0; forest.len() * 4];
        forest.read(0, forest.len(), &mut keys, &mut []).unwrap();
        bytemuck::cast_slice(&keys).to_vec()
    }

    fn insert(forest: &Forest, key: f32) -> usize {
        forest.insert(&key.to_le_bytes(), &[]).unwrap()
    }

    fn insert_all(forest: &Forest, keys: std::ops::Range<u16>) {
        for key in keys {
            insert(forest, f32::from(key));
        }
    }

    fn extend_one(forest: &Forest, key: f32) {
        let pool = ThreadPoolBuilder::new().num_threads(1).build().unwrap();
        extend(&pool, &[ExtendRow { forest, keys: &key.to_le_bytes(), values: &[] }]).unwrap();
    }

    #[test]
    fn a_writer_that_never_comes_back_stops_nobody() {
        let forest = forest();
        let stalled = forest.shared().begin().unwrap();
        for i in 0..2000 {
            if i % 100 == 99 {
                extend_one(&forest, i as f32);
            } else {
                assert_eq!(insert(&forest, i as f32), i);
            }
            let waiting = forest.shared().load().pending.len();
            assert!(waiting <= super::HELP_BLOCKS + 2, "{waiting} blocks wait");
        }
        assert_eq!(keys(&forest), (0..2000).map(|i| i as f32).collect::<Vec<_>>());
        assert_eq!(forest.remove(&[5, 1999]).unwrap(), 2);
        let fork = forest.fork();
        fork.crop(7).unwrap();
        forest.crop(1500).unwrap();
        assert_eq!((fork.len(), forest.len()), (7, 1500));
        assert_eq!([fork.validate(), forest.validate()], [Ok(()), Ok(())]);
        drop(stalled);
    }

    #[test]
    fn threads_that_stall_while_writing_rows_stop_nobody() {
        let forest = forest();
        for lanes in [LANES - 1, LANES, LANES] {
            // A block with room to come.
            let first = forest.len();
            insert(&forest, first as f32);
            let state = forest.shared().load();
            let Pending::Open(block) = &*state.pending.last().unwrap().block else { panic!("an open block") };
            block.stall(lanes);
            for i in first + 1..first + BLOCK_TOKENS + 3 {
                assert_eq!(insert(&forest, i as f32), i, "{lanes} lanes stalled");
            }
        }
        let expected: Vec<f32> = (0..forest.len()).map(|i| i as f32).collect();
        assert_eq!(keys(&forest), expected);
        forest.settle().unwrap();
        assert_eq!(keys(&forest), expected);
        forest.validate().unwrap();
    }

    #[test]
    fn a_row_whose_thread_stalled_before_it_had_a_position_never_appears() {
        let forest = forest();
        insert_all(&forest, 0..5);
        let state = forest.shared().load();
        assert_eq!(state.trees.tokens, 0, "not routed yet");
        forest.settle().unwrap();
        // The next slot of an open page is taken by an attempt that was never published.
        let state = forest.shared().load();
        let entry = &state.trees.heads[0].tail.entries[0];
        let row = crate::page::Row { key: &99.0_f32.to_le_bytes(), value: &[] };
        assert!(entry.page.append(entry.count as usize, 5, row));
        insert_all(&forest, 5..40);
        forest.settle().unwrap();
        assert_eq!(keys(&forest), (0..40).map(|i| i as f32).collect::<Vec<_>>());
        forest.validate().unwrap();
    }
}
