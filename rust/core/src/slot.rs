//! Boxes that change hands by one atomic operation: a place that is filled once, and one that holds at most one value.

use std::fmt;
use std::marker::PhantomData;
use std::ptr::{NonNull, null_mut};

use crate::sync::{AtomicPtr, Ordering, Site, acquire, acquire_release, release};

/// A place that is filled once. Unlike `OnceLock` nobody ever waits: who comes second gets its value back.
pub(crate) struct Once<T> {
    value: AtomicPtr<T>,
    // Owns the value, so it is as shareable as a box of it.
    owned: PhantomData<Box<T>>,
}

impl<T: Send + Sync> Once<T> {
    pub(crate) fn new() -> Self {
        Self { value: AtomicPtr::new(null_mut()), owned: PhantomData }
    }

    pub(crate) fn get(&self) -> Option<&T> {
        // Acquire: pairs with the Release in `set`; whoever finds the pointer sees the value.
        let value = NonNull::new(self.value.load(acquire(Site::Pointer)))?;
        // SAFETY: `set` put a box here, and nothing replaces or frees it before `drop`, which has no shared borrow.
        Some(unsafe { value.as_ref() })
    }

    /// Fills the place; gives `value` back when somebody else was first.
    pub(crate) fn set(&self, value: Box<T>) -> Result<&T, Box<T>> {
        let new = Box::into_raw(value);
        // Release: pairs with the Acquire in `get`. Acquire: nothing is read through the old pointer, which is null.
        let order = acquire_release(Site::Pointer);
        match self.value.compare_exchange(null_mut(), new, order, Ordering::Relaxed) {
            // SAFETY: as in `get`; the pointer is ours from a box, so it is not null.
            Ok(_) => Ok(unsafe { &*new }),
            // SAFETY: the exchange failed, so the pointer is still ours alone.
            Err(_) => Err(unsafe { Box::from_raw(new) }),
        }
    }
}

impl<T> Drop for Once<T> {
    fn drop(&mut self) {
        drop(take(&self.value));
    }
}

impl<T: fmt::Debug + Send + Sync> fmt::Debug for Once<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Once").field(&self.get()).finish()
    }
}

/// A place for one value that whoever comes first takes away.
pub(crate) struct Slot<T> {
    value: AtomicPtr<T>,
    owned: PhantomData<Box<T>>,
}

impl<T: Send> Slot<T> {
    pub(crate) fn new(value: Option<Box<T>>) -> Self {
        Self { value: AtomicPtr::new(value.map_or(null_mut(), Box::into_raw)), owned: PhantomData }
    }

    /// The value, if nobody has it. Lock-free.
    pub(crate) fn take(&self) -> Option<Box<T>> {
        take(&self.value)
    }

    /// Puts a value back; it is dropped when the place is not empty.
    pub(crate) fn put(&self, value: Box<T>) {
        let new = Box::into_raw(value);
        // Release: pairs with the Acquire in `take`.
        if self.value.compare_exchange(null_mut(), new, release(Site::Pointer), Ordering::Relaxed).is_err() {
            // SAFETY: the exchange failed, so the pointer is still ours alone.
            drop(unsafe { Box::from_raw(new) });
        }
    }
}

impl<T> Drop for Slot<T> {
    fn drop(&mut self) {
        drop(take(&self.value));
    }
}

impl<T> fmt::Debug for Slot<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Slot")
    }
}

fn take<T>(place: &AtomicPtr<T>) -> Option<Box<T>> {
    // Acquire: pairs with the Release in `put` and `set`.
    let value = place.swap(null_mut(), acquire(Site::Pointer));
    // SAFETY: only boxes are put here, and the swap made this one ours alone.
    if value.is_null() { None } else { Some(unsafe { Box::from_raw(value) }) }
}
