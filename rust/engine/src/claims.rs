//! Who answers which unit of a layer, and who of them was last.
#![forbid(unsafe_code)]

use crate::sync::{AtomicU32, Ordering, order};

/// The units of one layer in one step.
#[derive(Debug, Default)]
pub(crate) struct Claims {
    claimed: AtomicU32,
    done: AtomicU32,
}

impl Claims {
    /// A unit that nobody else gets; `None`: all `units` are taken.
    pub(crate) fn claim(&self, units: usize) -> Option<usize> {
        // Relaxed: makes claims unique; what a unit needs was acquired with the request's ticket.
        let unit = self.claimed.fetch_add(1, Ordering::Relaxed) as usize;
        (unit < units).then_some(unit)
    }

    /// Counts a unit as answered; true for the last one, which then sees what all others wrote before they counted theirs.
    pub(crate) fn finish(&self, units: usize) -> bool {
        // AcqRel: the read-modify-writes of all workers form one release sequence; it pairs with itself.
        self.done.fetch_add(1, order::done()) as usize + 1 == units
    }

    /// Units answered; exact once the workers have left.
    pub(crate) fn finished(&self) -> usize {
        // Relaxed: the workers left through the gate's lock.
        self.done.load(Ordering::Relaxed) as usize
    }
}

#[cfg(all(test, loom))]
mod models {
    use std::panic::{AssertUnwindSafe, catch_unwind};
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

    use loom::cell::UnsafeCell;
    use loom::sync::atomic::AtomicU32;
    use loom::thread;

    use super::Claims;
    use crate::sync::order;

    const UNITS: usize = 2;
    const TICKET: u32 = 7;

    /// What the mailbox holds. Loom fails when two accesses to a cell are not ordered.
    struct Shared {
        claims: Claims,
        request: AtomicU32,
        answered: AtomicU32,
        queries: UnsafeCell<()>,
        tables: [UnsafeCell<()>; UNITS],
    }

    /// One layer: two workers, and a device that posts and reads. Every thread is spawned, so that loom orders all.
    fn layer() {
        let shared = Arc::new(Shared {
            claims: Claims::default(),
            request: AtomicU32::new(0),
            answered: AtomicU32::new(0),
            queries: UnsafeCell::new(()),
            tables: [UnsafeCell::new(()), UnsafeCell::new(())],
        });
        let work = |shared: Arc<Shared>| {
            move || {
                if shared.request.load(order::request_seen()) != TICKET {
                    return;
                }
                while let Some(unit) = shared.claims.claim(UNITS) {
                    shared.queries.with(|_| ());
                    shared.tables[unit].with_mut(|_| ());
                    if shared.claims.finish(UNITS) {
                        shared.answered.store(TICKET, order::answer());
                    }
                }
            }
        };
        let device = {
            let shared = Arc::clone(&shared);
            move || {
                shared.queries.with_mut(|_| ());
                shared.request.store(TICKET, order::request());
                if shared.answered.load(order::answer_seen()) == TICKET {
                    shared.tables.iter().for_each(|table| table.with(|_| ()));
                }
            }
        };
        let threads =
            [thread::spawn(work(Arc::clone(&shared))), thread::spawn(work(Arc::clone(&shared))), thread::spawn(device)];
        for thread in threads {
            thread.join().unwrap();
        }
    }

    fn check() -> usize {
        let executions = Arc::new(AtomicUsize::new(0));
        let counted = Arc::clone(&executions);
        loom::model(move || {
            counted.fetch_add(1, SeqCst);
            layer();
        });
        executions.load(SeqCst)
    }

    /// One test: which orderings are weak is global.
    #[test]
    fn a_device_that_sees_the_answer_sees_all_tables_and_no_ordering_can_be_weaker() {
        assert!(check() > 100, "loom explored nothing");
        for site in order::SITES {
            order::weaken(Some(site));
            assert!(catch_unwind(AssertUnwindSafe(check)).is_err(), "{site:?} can be relaxed");
            order::weaken(None);
        }
    }
}
