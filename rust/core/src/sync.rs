//! The one place atomics and locks come from, so that a model checker can replace them.
#![forbid(unsafe_code)]

pub(crate) use std::sync::atomic::{AtomicU32, AtomicUsize, Ordering};
pub(crate) use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// Locks `mutex` where a panic of an earlier holder does not matter: it leaves complete states only.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
