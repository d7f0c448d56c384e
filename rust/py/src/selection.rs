//! Searching forests, and what a search chose.
#![expect(clippy::needless_pass_by_value, reason = "PyO3 extracts lists by value")]

use icecache_core::{self as core, Columns, PageLayout, SearchOptions};
use numpy::{PyArrayDyn, PyUntypedArrayMethods};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::arrays::{Target, count, optional_count, readonly, slice, to_array};
use crate::errors::run;
use crate::forest::Forest;
use crate::pool::Pool;

/// Pages chosen per (row, KV head); made by `search`, `select_pages`, `random_pages` and `all_pages`.
///
/// It keeps the snapshots it came from alive: its pages stay as they were, whatever happens to the forests.
#[pyclass(frozen, module = "icecache._core")]
pub(crate) struct Selection {
    inner: core::Selection,
    layout: Option<PageLayout>,
}

impl Selection {
    fn new(inner: core::Selection, forests: &[Bound<'_, Forest>]) -> Self {
        Self { inner, layout: forests.first().map(|forest| forest.get().inner.store().layout()) }
    }

    fn shape(&self) -> [usize; 3] {
        [self.inner.n_rows(), self.inner.n_heads(), self.inner.k()]
    }
}

#[pymethods]
impl Selection {
    /// Page ids, int64 (R, H, K); -1 for none, unique per head.
    #[getter]
    fn pages<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArrayDyn<i64>>> {
        to_array(py, self.inner.pages(), &self.shape())
    }

    /// Live tokens of each page, int32 (R, H, K).
    #[getter]
    fn counts<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArrayDyn<i32>>> {
        to_array(py, self.inner.counts(), &self.shape())
    }

    /// Share of the softmax mass of each page, averaged over the group, float32 (R, H, K), best first.
    #[getter]
    fn scores<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArrayDyn<f32>>> {
        to_array(py, self.inner.scores().to_vec(), &self.shape())
    }

    /// Natural log-sum-exp of the scaled logits, float32 (R, H, G, 2): of all pages, exact where they were scored and
    /// estimated elsewhere, and of the chosen pages, exact. Minus infinity when empty.
    #[getter]
    fn lse<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArrayDyn<f32>>> {
        let [rows, heads, _] = self.shape();
        to_array(py, self.inner.lse().to_vec(), &[rows, heads, self.inner.group(), 2])
    }

    /// What pages that are not chosen are estimated to give, float32 (R, H, G, `value_dim`), to be weighted by what `lse`
    /// leaves to them; None unless the search was asked for it.
    #[getter]
    fn unread<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyArrayDyn<f32>>>> {
        let [rows, heads, _] = self.shape();
        let (unread, group) = (self.inner.unread(), self.inner.group());
        if unread.is_empty() {
            return Ok(None);
        }
        to_array(py, unread.to_vec(), &[rows, heads, group, unread.len() / (rows * heads * group)]).map(Some)
    }

    /// Page summaries scored, int64 (R, H).
    #[getter]
    fn visited<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArrayDyn<i64>>> {
        let [rows, heads, _] = self.shape();
        to_array(py, self.inner.visited().to_vec(), &[rows, heads])
    }

    /// Token of each slot, int32 (R, H, K, 16), live slots first, then -1.
    fn positions<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArrayDyn<i32>>> {
        let positions = run::<_, core::Error>(py, || Ok(self.inner.positions()))?;
        let [rows, heads, k] = self.shape();
        to_array(py, positions, &[rows, heads, k, core::PAGE_TOKENS])
    }

    /// Copy pages first..last to `out_keys` and `out_values`, uint8 (R, H, last - first, 16, bytes), live slots first,
    /// unused slots zero; returns the bytes of live rows copied.
    ///
    /// With `key_at` or `value_at`: any columns of the rows instead, as many as the array has, from that byte of
    /// [key, value] on.
    #[pyo3(signature = (pool, first, last, out_keys, out_values, key_at=None, value_at=None))]
    #[expect(clippy::too_many_arguments, reason = "the arguments of the Python method")]
    fn gather(
        &self,
        py: Python<'_>,
        pool: &Bound<'_, Pool>,
        first: &Bound<'_, PyAny>,
        last: &Bound<'_, PyAny>,
        out_keys: &Bound<'_, PyAny>,
        out_values: &Bound<'_, PyAny>,
        key_at: Option<&Bound<'_, PyAny>>,
        value_at: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<usize> {
        let (first, last) = (count(first, "first")?, count(last, "last")?);
        let Some(n) = last.checked_sub(first) else {
            return Err(PyValueError::new_err(format!("first: expected at most last = {last}, got {first}")));
        };
        let [rows, heads, _] = self.shape();
        let shape = [Some(rows), Some(heads), Some(n), Some(core::PAGE_TOKENS)];
        let none = Columns { start: 0, len: 0 };
        let (key, value) = self.layout.map_or((none, none), |layout| (Columns::key(layout), Columns::value(layout)));
        let mut keys = Target::new(out_keys, "out_keys", &shape, optional_count(key_at, "key_at")?, key)?;
        let mut values = Target::new(out_values, "out_values", &shape, optional_count(value_at, "value_at")?, value)?;
        let (keys, values) = (keys.parts()?, values.parts()?);
        let pool = &pool.get().inner;
        run(py, || self.inner.gather_columns(pool, first, last, keys, values))
    }
}

/// Find the pages with the largest attention mass for every KV head and its group of queries.
///
/// `queries` is float32 (R, H, G, `key_dim`); `exact` scores every page from its keys; `estimate_unread` needs a store with
/// `value_means`.
#[pyfunction]
#[pyo3(signature = (
    pool, forests, queries, k, *, scaling, softcap=None, candidates=None, probe_mass=None, exact=false,
    estimate_unread=false
))]
#[expect(clippy::too_many_arguments, reason = "the keyword arguments of the Python function")]
pub(crate) fn search(
    py: Python<'_>,
    pool: &Bound<'_, Pool>,
    forests: Vec<Bound<'_, Forest>>,
    queries: &Bound<'_, PyAny>,
    k: &Bound<'_, PyAny>,
    scaling: f32,
    softcap: Option<f32>,
    candidates: Option<&Bound<'_, PyAny>>,
    probe_mass: Option<f32>,
    exact: bool,
    estimate_unread: bool,
) -> PyResult<Selection> {
    let candidates = optional_count(candidates, "candidates")?;
    let options = SearchOptions { k: count(k, "k")?, scaling, softcap, candidates, probe_mass, exact, estimate_unread };
    let first = forests.first().map(|forest| &forest.get().inner);
    let heads = first.map(|forest| forest.n_heads());
    let dim = first.map(|forest| forest.store().layout().key_dim);
    let queries = readonly::<f32>(queries, "queries", &[Some(forests.len()), heads, None, dim])?;
    let group = queries.shape()[2];
    let flat = slice(&queries, "queries")?;
    let trees: Vec<&core::Forest> = forests.iter().map(|forest| &*forest.get().inner).collect();
    let pool = &pool.get().inner;
    let found = run(py, || core::search(pool, &trees, flat, group, &options))?;
    Ok(Selection::new(found, &forests))
}

/// The given pages, int64 (R, H, K) ids of the current snapshots, -1 for none.
#[pyfunction]
pub(crate) fn select_pages(
    py: Python<'_>,
    forests: Vec<Bound<'_, Forest>>,
    pages: &Bound<'_, PyAny>,
) -> PyResult<Selection> {
    let heads = forests.first().map(|forest| forest.get().inner.n_heads());
    let pages = readonly::<i64>(pages, "pages", &[Some(forests.len()), heads, None])?;
    let k = pages.shape()[2];
    let flat = slice(&pages, "pages")?;
    let trees: Vec<&core::Forest> = forests.iter().map(|forest| &*forest.get().inner).collect();
    let chosen = run(py, || core::select_pages(&trees, flat, k))?;
    Ok(Selection::new(chosen, &forests))
}

/// Every page of every head; K is the largest number of pages of a head.
#[pyfunction]
pub(crate) fn all_pages(py: Python<'_>, forests: Vec<Bound<'_, Forest>>) -> PyResult<Selection> {
    let trees: Vec<&core::Forest> = forests.iter().map(|forest| &*forest.get().inner).collect();
    let chosen = run(py, || core::all_pages(&trees))?;
    Ok(Selection::new(chosen, &forests))
}

/// `k` pages of every head drawn at random, all of them where it has fewer; one seed per row.
#[pyfunction]
pub(crate) fn random_pages(
    py: Python<'_>,
    forests: Vec<Bound<'_, Forest>>,
    k: &Bound<'_, PyAny>,
    seeds: Vec<u64>,
) -> PyResult<Selection> {
    let k = count(k, "k")?;
    let trees: Vec<&core::Forest> = forests.iter().map(|forest| &*forest.get().inner).collect();
    let drawn = run(py, || core::random_pages(&trees, k, &seeds))?;
    Ok(Selection::new(drawn, &forests))
}
