//! Memory that growing trees will soon want, had ready by the maintenance thread of their store: so that the thread that
//! inserts neither asks for a slab (page-locking one takes 6 ms and more) nor is the first to write to its pages.
//!
//! Only a foresight: whoever finds too little takes a slab itself, as before, and no page number depends on it.
#![forbid(unsafe_code)]

use std::ops::Range;

use crate::arena::PageStore;
use crate::config::{PAGE_TOKENS, PART_TOKENS, SEGMENT_TOKENS, Sealing};
use crate::error::Result;
use crate::ids::PageId;
use crate::sync::{Arc, AtomicBool, AtomicUsize, Ordering};

/// Open pages that a tree takes before those of its frozen stretch come back.
const OPEN_PAGES: usize = PART_TOKENS / PAGE_TOKENS;
/// At most this part of what is in use is had ready: trees that never grow again must not hold much.
const MOST: usize = 8;

/// What a store knows about the time to come.
#[derive(Debug, Default)]
pub(crate) struct Provision {
    /// Trees that seal aside.
    trees: AtomicUsize,
    /// Pages below this number are ready.
    ready: AtomicUsize,
    /// Whether the maintenance thread was told.
    told: AtomicBool,
}

impl Provision {
    /// More trees that seal aside.
    pub(crate) fn begin(&self, trees: usize) {
        // Relaxed, as everything here: guesses, they order nothing.
        self.trees.fetch_add(trees, Ordering::Relaxed);
    }

    /// Trees that are gone.
    pub(crate) fn end(&self, trees: usize) {
        self.trees.fetch_sub(trees, Ordering::Relaxed);
    }
}

/// Pages that a tree of `tokens` tokens may take within half a stretch.
fn soon(tokens: usize, sealing: Sealing) -> usize {
    let Some(stretch) = sealing.stretch() else { return 0 };
    let left = stretch - tokens % stretch;
    let packed = if (tokens + left).is_multiple_of(SEGMENT_TOKENS) { SEGMENT_TOKENS } else { stretch };
    OPEN_PAGES + if left <= PART_TOKENS / 2 { packed / PAGE_TOKENS } else { 0 }
}

impl PageStore {
    /// Takes slabs from the allocator until `bytes` more of pages can be handed out, or the limit is reached. Pinning
    /// memory is slow (about 0.2 s a GiB).
    ///
    /// # Errors
    /// If the allocator has no more memory; slabs it gave before stay.
    pub fn reserve_bytes(&self, bytes: usize) -> Result<()> {
        // Leases that come later take from what is reserved here.
        let used = self.used_pages();
        self.grow_to(used + bytes.div_ceil(self.page_bytes()).min(self.room()))
    }

    /// Takes slabs from the allocator until there are `n_pages` pages, used or not.
    fn grow_to(&self, n_pages: usize) -> Result<()> {
        while self.n_pages() < n_pages {
            self.add_slab(self.n_pages() / self.slab_pages())?;
        }
        Ok(())
    }

    /// Has the allocator back these pages, which exist, by memory.
    fn commit(&self, mut pages: Range<usize>) {
        while !pages.is_empty() {
            let n = (self.slab_pages() - pages.start % self.slab_pages()).min(pages.len());
            let memory = self.page_memory(PageId(pages.start as u32));
            self.allocator.commit(memory, n * self.page_bytes());
            pages.start += n;
        }
    }

    /// Has pages ready for trees that have grown to `tokens` tokens. Lock-free; the work is done later, by the
    /// maintenance thread.
    pub(crate) fn foresee(self: &Arc<Self>, tokens: usize, sealing: Sealing) {
        let used = self.used_pages();
        let wanted = (self.provision.trees.load(Ordering::Relaxed) * soon(tokens, sealing)).min(used / MOST);
        let end = used + wanted.min(self.room());
        if end <= self.provision.ready.load(Ordering::Relaxed) || self.provision.told.swap(true, Ordering::Relaxed) {
            return;
        }
        let store = Arc::downgrade(self);
        self.background.later(move || {
            if let Some(store) = store.upgrade() {
                store.provision.told.store(false, Ordering::Relaxed);
                store.make_ready(end);
            }
        });
    }

    /// Sees to it that the first `end` pages exist and that those of them beyond what is in use are backed by memory.
    fn make_ready(&self, end: usize) {
        if self.grow_to(end).is_err() {
            // Whoever needs the pages asks again, and tells its caller.
            return;
        }
        let ready = self.provision.ready.fetch_max(end, Ordering::Relaxed);
        self.commit(ready.max(self.used_pages())..end);
    }
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, Instant};

    use rayon::{ThreadPool, ThreadPoolBuilder};

    use crate::slabs::watched::Watched;
    use crate::sync::{Arc, Ordering};
    use crate::{Dtype, ExtendRow, Forest, PageLayout, PageStore, Sealing, StoreOptions, extend};

    fn add(pool: &ThreadPool, forest: &Forest, n: usize) {
        let rows: Vec<u8> = (0..2 * n * 8).flat_map(|i| (((i * 37) % 101) as f32).to_le_bytes()).collect();
        extend(pool, &[ExtendRow { forest, keys: &rows, values: &rows }]).unwrap();
    }

    fn on_this_thread() -> ThreadPool {
        ThreadPoolBuilder::new().num_threads(1).use_current_thread().build().unwrap()
    }

    #[test]
    fn an_inserting_thread_asks_for_no_slab_once_its_trees_are_large() {
        let layout = PageLayout::new(Dtype::F32, 8, 8).unwrap();
        let pool = on_this_thread();
        let allocator = Watched::by_this_thread();
        let options = StoreOptions {
            slab_bytes: 16 * layout.page_bytes(),
            allocator: Box::new(allocator.clone()),
            ..StoreOptions::default()
        };
        let store = PageStore::new(layout, options).unwrap();
        let forest = Forest::with_sealing(Arc::clone(&store), 2, Sealing::Tiers).unwrap();
        add(&pool, &forest, 16 * 1024);
        add(&pool, &forest, 16);
        let before = allocator.own_slabs.load(Ordering::SeqCst);
        assert!(before > 0, "the bulk is built by this thread");
        for _ in 0..128 {
            // As long as decoding 16 tokens may take: until the maintenance thread has done what it was told.
            let late = Instant::now() + Duration::from_secs(20);
            while store.provision.told.load(Ordering::SeqCst) && Instant::now() < late {
                std::thread::yield_now();
            }
            std::thread::sleep(Duration::from_millis(1));
            add(&pool, &forest, 16);
        }
        assert_eq!(allocator.own_slabs.load(Ordering::SeqCst), before);
        assert!(allocator.committed.load(Ordering::SeqCst) > 0);
        forest.validate().unwrap();
    }

    #[test]
    fn trees_that_are_gone_are_not_provided_for() {
        let layout = PageLayout::new(Dtype::F32, 8, 8).unwrap();
        let store = PageStore::new(layout, StoreOptions::default()).unwrap();
        let pool = on_this_thread();
        let counts = || store.provision.trees.load(Ordering::SeqCst);
        let forest = Forest::with_sealing(Arc::clone(&store), 2, Sealing::Tiers).unwrap();
        add(&pool, &forest, 40);
        let (fork, ahead) = (forest.fork(), forest.ahead().unwrap());
        assert_eq!(counts(), 4, "a continuation grows in place of its origin");
        drop((fork, forest, ahead));
        assert_eq!(counts(), 0);
    }
}
