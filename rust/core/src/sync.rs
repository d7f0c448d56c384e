//! The one place atomics and locks come from, so that a model checker can replace them.
//!
//! Under `cfg(loom)` the atomics are loom's. [`release`] and [`acquire`] name the orderings that the protocol rests on:
//! a model can weaken one of them and show that it then fails. Otherwise they are constants.
#![forbid(unsafe_code)]

pub(crate) use std::sync::{Arc, OnceLock};

#[cfg(not(loom))]
pub(crate) use crossbeam_queue::SegQueue as Queue;
#[cfg(loom)]
pub(crate) use loom::sync::{Mutex, MutexGuard};
#[cfg(not(loom))]
pub(crate) use std::sync::{Mutex, MutexGuard};

#[cfg(loom)]
pub(crate) use loom::sync::atomic::{
    AtomicBool, AtomicPtr, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence,
};
#[cfg(not(loom))]
pub(crate) use std::sync::atomic::{
    AtomicBool, AtomicPtr, AtomicU8, AtomicU32, AtomicU64, AtomicUsize, Ordering, fence,
};

/// Locks a mutex where a panic of an earlier holder does not matter: it leaves complete values only.
pub(crate) fn guard<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Locks the mutex of a model.
#[cfg(loom)]
pub(crate) fn lock<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// What `crossbeam_queue::SegQueue` promises, in terms that loom understands: pushes and pops are atomic.
#[cfg(loom)]
#[derive(Debug)]
pub(crate) struct Queue<T>(Mutex<std::collections::VecDeque<T>>);

#[cfg(loom)]
impl<T> Default for Queue<T> {
    fn default() -> Self {
        Self(Mutex::new(std::collections::VecDeque::new()))
    }
}

#[cfg(loom)]
impl<T> Queue<T> {
    pub(crate) fn push(&self, value: T) {
        guard(&self.0).push_back(value);
    }

    pub(crate) fn pop(&self) -> Option<T> {
        guard(&self.0).pop_front()
    }
}

/// A pair of orderings that one step of the protocol needs (`README.md` has the argument for each).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Site {
    /// A row is written before its bit: `OpenPage::append` and `OpenPage::published`.
    Slot,
    /// A row is written before it gets its position: `Block::append` and `Block::entry`.
    Log,
    /// A state is complete before it is current: `Cell::replace` and `Cell::load`. Outside a model that is up to `arc-swap`.
    #[cfg_attr(not(loom), expect(dead_code, reason = "only the model of `Cell` names it"))]
    State,
    /// A lane's slots are known to its next holder.
    Lane,
    /// A page was read for the last time before it is free: `PageStore::give_back` and `PageStore::lease`.
    Free,
    /// A value is complete before it can be found: `Once::set` and `Once::get`, `Slot::put` and `Slot::take`.
    Pointer,
}

#[cfg(not(loom))]
mod orderings {
    use super::{Ordering, Site};

    #[inline]
    pub(crate) const fn release(_: Site) -> Ordering {
        Ordering::Release
    }

    #[inline]
    pub(crate) const fn acquire(_: Site) -> Ordering {
        Ordering::Acquire
    }

    #[inline]
    pub(crate) const fn acquire_release(_: Site) -> Ordering {
        Ordering::AcqRel
    }
}

#[cfg(loom)]
mod orderings {
    use std::sync::Mutex;

    use super::{Ordering, Site, lock};

    static WEAKENED: Mutex<Option<Site>> = Mutex::new(None);

    /// Makes the orderings of one site relaxed from now on.
    pub(crate) fn weaken(site: Option<Site>) {
        *lock(&WEAKENED) = site;
    }

    fn unless_weakened(site: Site, ordering: Ordering) -> Ordering {
        if *lock(&WEAKENED) == Some(site) { Ordering::Relaxed } else { ordering }
    }

    pub(crate) fn release(site: Site) -> Ordering {
        unless_weakened(site, Ordering::Release)
    }

    pub(crate) fn acquire(site: Site) -> Ordering {
        unless_weakened(site, Ordering::Acquire)
    }

    pub(crate) fn acquire_release(site: Site) -> Ordering {
        unless_weakened(site, Ordering::AcqRel)
    }
}

pub(crate) use orderings::*;

/// Tells a model which slots of a page are read and written, so that it finds accesses that nothing orders. Nothing
/// otherwise: page memory is plain bytes.
#[cfg(not(loom))]
mod tracks {
    #[derive(Debug)]
    pub(crate) struct Tracks;

    pub(crate) const fn note_free() {}

    impl Tracks {
        pub(crate) const fn new(_slots: usize) -> Self {
            Self
        }

        #[expect(clippy::unused_self, reason = "a model has something to do here")]
        pub(crate) const fn write(&self, _slot: usize) {}

        #[expect(clippy::unused_self, reason = "a model has something to do here")]
        pub(crate) const fn read(&self, _first: usize, _count: usize) {}
    }
}

#[cfg(loom)]
mod tracks {
    use loom::cell::UnsafeCell;

    #[derive(Debug)]
    pub(crate) struct Tracks(Vec<UnsafeCell<()>>);

    impl Tracks {
        pub(crate) fn new(slots: usize) -> Self {
            Self((0..slots).map(|_| UnsafeCell::new(())).collect())
        }

        pub(crate) fn write(&self, slot: usize) {
            self.0[slot].with_mut(|_| ());
        }

        pub(crate) fn read(&self, first: usize, count: usize) {
            self.0[first..first + count].iter().for_each(|cell| cell.with(|_| ()));
        }
    }

    loom::lazy_static! {
        static ref DROPPED: loom::sync::atomic::AtomicUsize = loom::sync::atomic::AtomicUsize::new(0);
    }

    /// A reader lets go of what it read: what `Arc` does when a reference is dropped, which loom does not see.
    pub(crate) fn note_drop() {
        DROPPED.fetch_add(1, loom::sync::atomic::Ordering::Release);
    }

    /// Nobody refers to some pages any more: what `Arc` does before it drops its value.
    pub(crate) fn note_free() {
        DROPPED.fetch_add(0, loom::sync::atomic::Ordering::Acquire);
    }
}

#[cfg(loom)]
pub(crate) use tracks::note_drop;
pub(crate) use tracks::{Tracks, note_free};
