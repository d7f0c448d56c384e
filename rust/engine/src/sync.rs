//! The one place atomics and locks come from, and the orderings that the mailbox rests on (`README.md` argues for them).
//!
//! Under `cfg(loom)` the atomics are loom's, and a model can weaken one ordering to show that it then fails.
#![forbid(unsafe_code)]

#[cfg(loom)]
pub(crate) use loom::sync::atomic::AtomicU32;
#[cfg(not(loom))]
pub(crate) use std::sync::atomic::AtomicU32;
pub(crate) use std::sync::atomic::{AtomicBool, AtomicU32 as Word, AtomicU64, AtomicUsize, Ordering};
pub(crate) use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Locks `mutex` where a panic of an earlier holder does not matter: it leaves complete states only.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Orderings of the tickets.
#[cfg(not(loom))]
pub(crate) mod order {
    use super::Ordering;

    /// A worker looks for the request; pairs with the device's release after the queries.
    pub(crate) const fn request_seen() -> Ordering {
        Ordering::Acquire
    }

    /// A worker counts a unit as answered; pairs with itself.
    pub(crate) const fn done() -> Ordering {
        Ordering::AcqRel
    }

    /// The answer's ticket; pairs with the device's acquire before it reads the tables.
    pub(crate) const fn answer() -> Ordering {
        Ordering::Release
    }
}

#[cfg(loom)]
pub(crate) mod order {
    use std::sync::Mutex;

    use super::{Ordering, lock};

    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(crate) enum Site {
        Request,
        RequestSeen,
        Done,
        Answer,
        AnswerSeen,
    }

    pub(crate) const SITES: [Site; 5] = [Site::Request, Site::RequestSeen, Site::Done, Site::Answer, Site::AnswerSeen];

    static WEAKENED: Mutex<Option<Site>> = Mutex::new(None);

    pub(crate) fn weaken(site: Option<Site>) {
        *lock(&WEAKENED) = site;
    }

    fn unless_weakened(site: Site, ordering: Ordering) -> Ordering {
        if *lock(&WEAKENED) == Some(site) { Ordering::Relaxed } else { ordering }
    }

    pub(crate) fn request() -> Ordering {
        unless_weakened(Site::Request, Ordering::Release)
    }

    pub(crate) fn request_seen() -> Ordering {
        unless_weakened(Site::RequestSeen, Ordering::Acquire)
    }

    pub(crate) fn done() -> Ordering {
        unless_weakened(Site::Done, Ordering::AcqRel)
    }

    pub(crate) fn answer() -> Ordering {
        unless_weakened(Site::Answer, Ordering::Release)
    }

    pub(crate) fn answer_seen() -> Ordering {
        unless_weakened(Site::AnswerSeen, Ordering::Acquire)
    }
}
