//! What changed in the pages of some forests.
#![expect(clippy::needless_pass_by_value, reason = "PyO3 extracts lists by value")]

use std::sync::{Mutex, MutexGuard, PoisonError};

use icecache_core::{self as core, Forest as Trees};
use numpy::PyArrayDyn;
use pyo3::prelude::*;

use crate::arrays::{count, to_array};
use crate::errors::run;
use crate::forest::Forest;
use crate::pool::Pool;

/// Slots and words of what changed, extents, tokens, and the largest extent.
type Changes<'py> = (
    Bound<'py, PyArrayDyn<i64>>,
    Bound<'py, PyArrayDyn<i64>>,
    Bound<'py, PyArrayDyn<i32>>,
    Bound<'py, PyArrayDyn<i64>>,
    usize,
);

/// Says what changed in the pages of many trees since the last look, for a device that keeps summaries of them.
///
/// The pages of the last look stay as they were until the next one, or until `clear`.
#[pyclass(frozen, module = "icecache._core")]
#[derive(Default)]
pub(crate) struct Mirror {
    inner: Mutex<core::Mirror>,
}

impl Mirror {
    fn lock(&self) -> MutexGuard<'_, core::Mirror> {
        // A panic half-way leaves the last complete look.
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[pymethods]
impl Mirror {
    #[new]
    fn new() -> Self {
        Self::default()
    }

    /// Look at the trees of all `forests` in order; `stride` is the number of slots a tree has.
    ///
    /// Returns (slots, words, extents, tokens, needed): int64 (n,) `tree * stride + slot` and int64 (n,) page words of the
    /// slots that changed (address, live slots in the upper 16 bits, 0 for no page), int32 (trees,) slots in use, int64
    /// (trees,) tokens, and the largest extent. If that is above `stride`, the arrays are empty and the last look stands.
    fn update<'py>(
        &self,
        py: Python<'py>,
        pool: &Bound<'py, Pool>,
        forests: Vec<Bound<'py, Forest>>,
        stride: &Bound<'py, PyAny>,
    ) -> PyResult<Changes<'py>> {
        let stride = count(stride, "stride")?;
        let pool = &pool.get().inner;
        let forests: Vec<&Trees> = forests.iter().map(|forest| &*forest.get().inner).collect();
        let found = run::<_, core::Error>(py, || Ok(self.lock().update(pool, &forests, stride)))?;
        let (n, trees) = (found.slots.len(), found.extents.len());
        let words = found.words.into_iter().map(u64::cast_signed).collect();
        let extents = found.extents.into_iter().map(u32::cast_signed).collect();
        let tokens = found.tokens.into_iter().map(|tokens| tokens as i64).collect();
        Ok((
            to_array(py, found.slots, &[n])?,
            to_array(py, words, &[n])?,
            to_array(py, extents, &[trees])?,
            to_array(py, tokens, &[trees])?,
            found.needed,
        ))
    }

    /// Look ahead, in the background, at `forests` as the trees will be when `update` is called next.
    ///
    /// If they are, `update` has nothing left to compare; a forest may be a continuation that is adopted by then.
    fn foresee(
        &self,
        py: Python<'_>,
        pool: &Bound<'_, Pool>,
        forests: Vec<Bound<'_, Forest>>,
        stride: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let stride = count(stride, "stride")?;
        let pool = &pool.get().inner;
        let forests: Vec<&Trees> = forests.iter().map(|forest| &*forest.get().inner).collect();
        run::<_, core::Error>(py, || {
            self.lock().foresee(pool, &forests, stride);
            Ok(())
        })
    }

    /// Forget the last look, so that its pages can be freed.
    fn clear(&self, py: Python<'_>) -> PyResult<()> {
        run::<_, core::Error>(py, || {
            self.lock().clear();
            Ok(())
        })
    }
}
