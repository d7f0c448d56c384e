//! Freed pages that a device may still read wait here until the steps that could name them are done.
//!
//! A *step* is a stretch of time in which somebody outside the reference counts (a GPU kernel) may read any page that was
//! published when the step began or later in it. A page that is freed is stamped with the newest step begun so far; its
//! memory is handed out again once every step up to that one is finished. Steps that begin later cannot name the page:
//! no snapshot leads to it any more.
//!
//! Without steps a free costs two loads. Retiring pages is lock-free; beginning and finishing a step takes a short lock
//! that only those who do so share.
#![forbid(unsafe_code)]

use std::collections::BTreeSet;

use crate::ids::PageRef;
use crate::sync::{AtomicU64, AtomicUsize, Mutex, Ordering, Queue, fence, guard};

/// Pages freed together, and the newest step that may name them.
type Batch = (u64, Vec<PageRef>);

/// The steps of one store and the pages that wait for them.
#[derive(Debug, Default)]
pub(crate) struct Retired {
    /// Newest step begun; steps count from 1.
    newest: AtomicU64,
    /// Steps up to this one are finished.
    finished: AtomicU64,
    /// Steps begun and not finished.
    active: Mutex<BTreeSet<u64>>,
    waiting: Queue<Batch>,
    n_waiting: AtomicUsize,
}

impl Retired {
    /// Begins a step and returns its number. Blocking: waits for others who begin or finish a step.
    pub(crate) fn begin(&self) -> u64 {
        let mut active = guard(&self.active);
        // Relaxed: written under this lock only.
        let step = self.newest.load(Ordering::Relaxed) + 1;
        active.insert(step);
        // Release: pairs with the Acquire in `retire`. A step's references to a page are dropped after this, and the
        // page is freed after they are, so whoever frees it sees the step.
        self.newest.store(step, Ordering::Release);
        step
    }

    /// Ends a step and hands all pages that nobody can name any more to `free`. Blocking like [`Retired::begin`].
    pub(crate) fn finish(&self, step: u64, free: impl FnMut(&[PageRef])) {
        let mut active = guard(&self.active);
        active.remove(&step);
        // Relaxed: written under this lock only.
        let newest = self.newest.load(Ordering::Relaxed);
        let finished = active.first().map_or(newest, |first| first - 1);
        // Release: pairs with the Acquire in `finished`: the step's reads come before any reuse of the memory.
        self.finished.store(finished, Ordering::Release);
        drop(active);
        self.flush(free);
    }

    /// Hands pages to `free` now, or later if a step may still name them. Lock-free.
    pub(crate) fn retire(&self, pages: &[PageRef], mut free: impl FnMut(&[PageRef])) {
        // Acquire: pairs with the Release in `begin`.
        let stamp = self.newest.load(Ordering::Acquire);
        if self.finished() >= stamp {
            free(pages);
            return;
        }
        // Relaxed: a statistic.
        self.n_waiting.fetch_add(pages.len(), Ordering::Relaxed);
        self.waiting.push((stamp, pages.to_vec()));
        // SeqCst: this push before the load below, and (in `flush`) a store to `finished` before a look at the queue.
        // So either the thread that ends the step finds these pages, or this one learns that the step has ended.
        fence(Ordering::SeqCst);
        if self.finished() >= stamp {
            self.flush(free);
        }
    }

    /// Pages that wait for a step.
    pub(crate) fn n_waiting(&self) -> usize {
        // Relaxed: a statistic.
        self.n_waiting.load(Ordering::Relaxed)
    }

    fn finished(&self) -> u64 {
        // Acquire: pairs with the Release in `finish`.
        self.finished.load(Ordering::Acquire)
    }

    /// Frees all waiting pages whose steps are done. Lock-free: goes round again only when a step ended meanwhile.
    fn flush(&self, mut free: impl FnMut(&[PageRef])) {
        loop {
            // SeqCst: see `retire`.
            fence(Ordering::SeqCst);
            let finished = self.finished();
            let mut early = Vec::new();
            while let Some((stamp, pages)) = self.waiting.pop() {
                if stamp <= finished {
                    self.n_waiting.fetch_sub(pages.len(), Ordering::Relaxed);
                    free(&pages);
                } else {
                    early.push((stamp, pages));
                }
            }
            if early.is_empty() {
                return;
            }
            for batch in early {
                self.waiting.push(batch);
            }
            // SeqCst: as in `retire`. Who ended a step while these pages were out of the queue did not find them.
            fence(Ordering::SeqCst);
            if self.finished() == finished {
                return;
            }
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::cell::RefCell;
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::Retired;
    use crate::ids::{PageId, PageRef};
    use crate::sync::{AtomicUsize, Ordering};

    fn page(id: u32) -> PageRef {
        PageRef { id: PageId(id), generation: 0 }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: if cfg!(miri) { 4 } else { 256 }, ..ProptestConfig::default() })]

        /// Against a list of (page, steps that were active when it was freed): a page comes out exactly when the last of
        /// its steps ends, and before that never.
        #[test]
        fn pages_wait_for_the_steps_that_were_active_when_they_were_freed(actions in prop::collection::vec(0..8_usize, 1..80)) {
            let (retired, out) = (Retired::default(), RefCell::new(BTreeSet::new()));
            let free = |pages: &[PageRef]| out.borrow_mut().extend(pages.iter().map(|page| page.id.0));
            let (mut active, mut waiting, mut expected) = (Vec::new(), Vec::new(), BTreeSet::new());
            for (id, action) in (0_u32..).zip(actions) {
                match action {
                    0..3 => active.push(retired.begin()),
                    3..5 if !active.is_empty() => {
                        // Not always the oldest.
                        let step = active.remove(action * 7 % active.len());
                        retired.finish(step, free);
                    }
                    _ => {
                        retired.retire(&[page(id)], free);
                        waiting.push((id, active.clone()));
                    }
                }
                waiting.retain(|(id, steps): &(u32, Vec<u64>)| {
                    // Steps end in any order, but only the oldest one that still runs is known.
                    let runs = active.iter().min().is_some_and(|first| steps.iter().max() >= Some(first));
                    if !runs {
                        expected.insert(*id);
                    }
                    runs
                });
                prop_assert_eq!(&*out.borrow(), &expected);
                prop_assert_eq!(retired.n_waiting(), waiting.len());
            }
        }
    }

    #[test]
    fn no_page_is_lost_or_early_when_many_threads_free_and_end_steps() {
        let (retired, freed) = (Retired::default(), AtomicUsize::new(0));
        let free = |pages: &[PageRef]| {
            freed.fetch_add(pages.len(), Ordering::Relaxed);
        };
        let (steps, frees) = if cfg!(miri) { (20, 40) } else { (2_000_u32, 4_000) };
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| (0..steps).for_each(|_| retired.finish(retired.begin(), free)));
                scope.spawn(|| (0..frees).for_each(|id| retired.retire(&[page(id)], free)));
            }
        });
        assert_eq!(freed.into_inner(), 2 * frees as usize, "all are free once all steps are done");
        assert_eq!(retired.n_waiting(), 0);
    }
}
