//! Work of one worker in which idle ones join.
//!
//! Every worker has a slot. To share, it puts a task into its slot and starts on the parts itself; workers that wait for
//! the next request look through the slots and take parts too. A part is claimed with `fetch_add`. The owner returns only
//! after it has closed its slot and everybody who entered has left, so the task may borrow from its stack.

use std::panic::{AssertUnwindSafe, catch_unwind};

use icecache_core::Share;

use crate::sync::{AtomicBool, AtomicUsize, Mutex, Ordering, lock};

type Part<'a> = dyn Fn(usize) + Sync + 'a;

/// A task whose borrow is not known to the type; only used between entering and leaving a slot.
#[derive(Debug, Clone, Copy)]
struct Task {
    part: *const Part<'static>,
    n: usize,
}

// SAFETY: the task behind the pointer is `Sync`, and alive while it is used (see `Slot::enter`).
unsafe impl Send for Task {}

/// Own cache lines: idle workers look at all slots.
#[derive(Debug, Default)]
#[repr(align(128))]
struct Slot {
    /// A hint that there is a task.
    open: AtomicBool,
    task: Mutex<Option<Task>>,
    /// Next part to claim.
    next: AtomicUsize,
    /// Helpers that entered and have not left.
    inside: AtomicUsize,
    panicked: AtomicBool,
}

/// The slots of all workers of an engine.
#[derive(Debug)]
pub(crate) struct Board {
    slots: Box<[Slot]>,
}

impl Board {
    pub(crate) fn new(workers: usize) -> Self {
        Self { slots: (0..workers).map(|_| Slot::default()).collect() }
    }

    /// Joins in the work of another worker, if any shares some now.
    pub(crate) fn help(&self, worker: usize) -> bool {
        let n = self.slots.len();
        (1..n).map(|i| &self.slots[(worker + i) % n]).any(Slot::join)
    }
}

impl Slot {
    /// Runs parts of this slot's task until none is left; false: there is none to take.
    fn join(&self) -> bool {
        // Relaxed: a hint; the lock in `enter` orders what counts.
        if !self.open.load(Ordering::Relaxed) {
            return false;
        }
        let Some(task) = self.enter() else { return false };
        let run = || {
            // SAFETY: entered while the slot was open, and not left yet: the owner is still inside `share`.
            let part = unsafe { &*task.part };
            self.run(task.n, part);
        };
        if catch_unwind(AssertUnwindSafe(run)).is_err() {
            // Relaxed: ordered by the Release below.
            self.panicked.store(true, Ordering::Relaxed);
        }
        // Release: pairs with the Acquire in `Closing::drop`; the owner then sees all that the parts wrote.
        self.inside.fetch_sub(1, Ordering::Release);
        true
    }

    fn enter(&self) -> Option<Task> {
        let task = lock(&self.task);
        // Relaxed: a hint; a helper that finds no part left leaves at once.
        let task = task.filter(|task| self.next.load(Ordering::Relaxed) < task.n)?;
        // Relaxed: under the lock, which the owner takes to close the slot before it reads the number.
        self.inside.fetch_add(1, Ordering::Relaxed);
        Some(task)
    }

    fn run(&self, n: usize, part: &Part<'_>) {
        loop {
            // Relaxed: makes parts unique; the task was published by the lock.
            let i = self.next.fetch_add(1, Ordering::Relaxed);
            if i >= n {
                return;
            }
            part(i);
        }
    }
}

/// Closes a slot and waits for helpers, also when the owner's own part panics.
struct Closing<'a>(&'a Slot);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        // Relaxed: a hint.
        self.0.open.store(false, Ordering::Relaxed);
        *lock(&self.0.task) = None;
        // Acquire: pairs with the Release of helpers that leave.
        while self.0.inside.load(Ordering::Acquire) > 0 {
            std::hint::spin_loop();
        }
    }
}

/// A worker's way to share.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Sharer<'a> {
    pub(crate) board: &'a Board,
    pub(crate) worker: usize,
}

impl Sharer<'_> {
    /// Whether nobody could help.
    pub(crate) fn is_alone(&self) -> bool {
        self.board.slots.len() == 1
    }
}

impl Share for Sharer<'_> {
    fn share(&self, n: usize, part: &Part<'_>) {
        if n <= 1 || self.is_alone() {
            (0..n).for_each(part);
            return;
        }
        let slot = &self.board.slots[self.worker];
        // Relaxed: nobody is inside; the lock below publishes it.
        slot.next.store(0, Ordering::Relaxed);
        // SAFETY: only the lifetime of the borrow changes; `Closing` ends all use of it before this call returns.
        let part_for_all = unsafe { std::mem::transmute::<&Part<'_>, &'static Part<'static>>(part) };
        *lock(&slot.task) = Some(Task { part: std::ptr::from_ref(part_for_all), n });
        // Relaxed: a hint.
        slot.open.store(true, Ordering::Relaxed);
        let closing = Closing(slot);
        slot.run(n, part);
        drop(closing);
        // Relaxed: the helper left with Release, and `Closing` acquired it.
        assert!(!slot.panicked.swap(false, Ordering::Relaxed), "a worker that helped panicked");
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};

    use icecache_core::Share;

    use super::{Board, Sharer};
    use crate::sync::{AtomicBool, AtomicUsize, Ordering};

    /// Runs `owner` while three helpers look for work.
    fn with_helpers(board: &Board, owner: impl FnOnce(Sharer<'_>)) {
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for worker in 1..4 {
                let done = &done;
                scope.spawn(move || {
                    while !done.load(Ordering::Acquire) {
                        board.help(worker);
                        std::thread::yield_now();
                    }
                });
            }
            let ended = catch_unwind(AssertUnwindSafe(|| owner(Sharer { board, worker: 0 })));
            done.store(true, Ordering::Release);
            if let Err(panic) = ended {
                resume_unwind(panic);
            }
        });
    }

    #[test]
    fn every_part_runs_once_before_share_returns() {
        let board = Board::new(4);
        with_helpers(&board, |sharer| {
            for round in 0..300 {
                let counts: Vec<AtomicUsize> = (0..round % 9).map(|_| AtomicUsize::new(0)).collect();
                sharer.share(counts.len(), &|i| {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(counts.into_iter().all(|count| count.into_inner() == 1));
            }
        });
    }

    #[test]
    fn a_panic_in_any_part_reaches_the_owner_after_all_have_left() {
        let board = Board::new(4);
        with_helpers(&board, |sharer| {
            for bad in 0..20 {
                let running = AtomicUsize::new(0);
                let result = catch_unwind(AssertUnwindSafe(|| {
                    sharer.share(20, &|i| {
                        running.fetch_add(1, Ordering::Relaxed);
                        std::thread::yield_now();
                        running.fetch_sub(1, Ordering::Relaxed);
                        assert!(i != bad, "asked to");
                    });
                }));
                assert!(result.is_err());
                assert_eq!(running.into_inner(), 0);
                sharer.share(5, &|_| {});
            }
        });
    }
}
