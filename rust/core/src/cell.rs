//! The current state of something: readers load it, writers replace it by compare-and-swap.
#![forbid(unsafe_code)]

#[cfg(not(loom))]
pub(crate) use swap::Cell;

#[cfg(loom)]
pub(crate) use model::Cell;

#[cfg(not(loom))]
mod swap {
    use arc_swap::ArcSwap;

    use crate::sync::Arc;

    /// A reference-counted value that is replaced as a whole. Lock-free; loads are wait-free but for a rare slow path
    /// of `arc-swap`.
    #[derive(Debug)]
    pub(crate) struct Cell<T>(ArcSwap<T>);

    impl<T> Cell<T> {
        pub(crate) fn new(value: T) -> Self {
            Self(ArcSwap::from_pointee(value))
        }

        pub(crate) fn load(&self) -> Arc<T> {
            self.0.load_full()
        }

        /// Looks at the value without counting a reference.
        pub(crate) fn with<R>(&self, f: impl FnOnce(&T) -> R) -> R {
            f(&self.0.load())
        }

        /// Replaces `current` by `new`; `false` when something else is current by now.
        pub(crate) fn replace(&self, current: &Arc<T>, new: Arc<T>) -> bool {
            let found = self.0.compare_and_swap(current, new);
            Arc::ptr_eq(&found, current)
        }
    }
}

/// What `arc-swap` promises, in terms that loom understands: the pointer is read and replaced by single atomic
/// operations with acquire and release, a load counts a reference at once, and a replaced value loses the cell's own.
/// Inside `arc-swap` (its debts, its reference counts) the models see nothing.
#[cfg(loom)]
mod model {
    use std::sync::Mutex;

    use crate::sync::{Arc, AtomicUsize, Ordering, Site, acquire, acquire_release, lock};

    #[derive(Debug)]
    pub(crate) struct Cell<T> {
        /// Place in `values` of the current one.
        current: AtomicUsize,
        values: Mutex<Vec<Option<Arc<T>>>>,
    }

    impl<T> Cell<T> {
        pub(crate) fn new(value: T) -> Self {
            Self { current: AtomicUsize::new(0), values: Mutex::new(vec![Some(Arc::new(value))]) }
        }

        pub(crate) fn load(&self) -> Arc<T> {
            // A read-modify-write, because `arc-swap` never returns a value that was already replaced when the load began.
            let place = self.current.fetch_add(0, acquire(Site::State));
            lock(&self.values)[place].clone().expect("the current value is there")
        }

        pub(crate) fn with<R>(&self, f: impl FnOnce(&T) -> R) -> R {
            f(&self.load())
        }

        pub(crate) fn replace(&self, current: &Arc<T>, new: Arc<T>) -> bool {
            let (old, place) = {
                let mut values = lock(&self.values);
                values.push(Some(new));
                let is_current =
                    |value: &Option<Arc<T>>| value.as_ref().is_some_and(|value| Arc::ptr_eq(value, current));
                let Some(old) = values.iter().position(is_current) else { return false };
                (old, values.len() - 1)
            };
            let order = acquire_release(Site::State);
            if self.current.compare_exchange(old, place, order, Ordering::Relaxed).is_err() {
                return false;
            }
            let replaced = lock(&self.values)[old].take();
            drop(replaced);
            true
        }
    }
}
