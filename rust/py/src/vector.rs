//! The standalone index; `icecache.Index` is the friendly side of it.

use icecache_core::Dtype;
use icecache_core::vector::{self as core, Metric, OnConflict, VectorConfig, VectorError};
use numpy::{PyArray1, PyArrayDyn, PyUntypedArrayMethods};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use crate::arrays::{count, optional_count, readonly, slice, to_array};
use crate::errors::{IntoPy, run};
use crate::pool::Pool;

/// Ids and distances of a search.
type Found<'py> = (Bound<'py, PyArrayDyn<i64>>, Bound<'py, PyArrayDyn<f32>>);

/// Vectors with ids, searched by inner product, squared L2 or cosine.
///
/// Parameters
/// ----------
/// dim : int
///     1..=65536.
/// metric : {"ip", "l2", "cosine"}
/// dtype : {"float32", "float16", "bfloat16"}
/// center : bool, default=True
/// seed : int, default=0
#[pyclass(frozen, module = "icecache._core")]
pub(crate) struct VectorIndex {
    inner: core::VectorIndex,
}

#[pymethods]
impl VectorIndex {
    #[new]
    #[pyo3(signature = (dim, metric, dtype, center=true, seed=None))]
    fn new(
        py: Python<'_>,
        dim: &Bound<'_, PyAny>,
        metric: &str,
        dtype: &str,
        center: bool,
        seed: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let dim = count(dim, "dim")?;
        let seed = optional_count(seed, "seed")?.unwrap_or(0) as u64;
        let make = || {
            let (metric, dtype) = (Metric::from_name(metric)?, Dtype::parse(dtype).map_err(VectorError::from)?);
            core::VectorIndex::new(VectorConfig { dim, metric, dtype, center, seed })
        };
        make().map(|inner| Self { inner }).map_err(|error| error.into_py(py))
    }

    /// Length of a vector.
    #[getter]
    fn dim(&self) -> usize {
        self.inner.config().dim
    }

    /// "ip", "l2" or "cosine".
    #[getter]
    fn metric(&self) -> &'static str {
        self.inner.config().metric.name()
    }

    /// How vectors are stored.
    #[getter]
    fn dtype(&self) -> &'static str {
        self.inner.config().dtype.name()
    }

    fn __len__(&self) -> usize {
        self.inner.len()
    }

    /// Add vectors, float32 (n, dim), under the given ids, int64 (n,), or the next free ones; returns the ids.
    fn add<'py>(
        &self,
        py: Python<'py>,
        pool: &Bound<'_, Pool>,
        ids: Option<&Bound<'py, PyAny>>,
        vectors: &Bound<'py, PyAny>,
        on_conflict: &str,
    ) -> PyResult<Bound<'py, PyArray1<i64>>> {
        let rule = OnConflict::from_name(on_conflict).map_err(|error| error.into_py(py))?;
        let vectors = readonly::<f32>(vectors, "vectors", &[None, Some(self.dim())])?;
        let ids = ids.map(|ids| readonly::<i64>(ids, "ids", &[Some(vectors.shape()[0])])).transpose()?;
        let ids = ids.as_ref().map(|ids| slice(ids, "ids")).transpose()?;
        let (rows, pool) = (slice(&vectors, "vectors")?, &pool.get().inner);
        let added = run(py, || self.inner.add(pool, ids, rows, rule))?;
        Ok(PyArray1::from_vec(py, added))
    }

    /// Ids, int64 (n, k), and distances, float32 (n, k), of the nearest vectors of queries, float32 (n, dim).
    #[pyo3(signature = (pool, queries, k, beam=None, exact=false))]
    fn search<'py>(
        &self,
        py: Python<'py>,
        pool: Option<&Bound<'_, Pool>>,
        queries: &Bound<'py, PyAny>,
        k: &Bound<'_, PyAny>,
        beam: Option<&Bound<'_, PyAny>>,
        exact: bool,
    ) -> PyResult<Found<'py>> {
        let (k, beam) = (count(k, "k")?, optional_count(beam, "beam")?);
        let queries = readonly::<f32>(queries, "queries", &[None, Some(self.dim())])?;
        let shape = [queries.shape()[0], k];
        let (rows, pool) = (slice(&queries, "queries")?, pool.map(|pool| &*pool.get().inner));
        let found = run(py, || self.inner.search(pool, rows, k, beam, exact))?;
        Ok((to_array(py, found.ids, &shape)?, to_array(py, found.distances, &shape)?))
    }

    /// Remove ids, int64 (n,); returns how many there were. With `strict`, a missing one is a `KeyError`.
    fn remove(&self, py: Python<'_>, pool: &Bound<'_, Pool>, ids: &Bound<'_, PyAny>, strict: bool) -> PyResult<usize> {
        let ids = readonly::<i64>(ids, "ids", &[None])?;
        let (ids, pool) = (slice(&ids, "ids")?, &pool.get().inner);
        run(py, || self.inner.remove(pool, ids, strict))
    }

    /// Vectors by id, float32 (n, dim).
    fn get<'py>(&self, py: Python<'py>, ids: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyArrayDyn<f32>>> {
        let ids = readonly::<i64>(ids, "ids", &[None])?;
        let flat = slice(&ids, "ids")?;
        let rows = run(py, || self.inner.get(flat))?;
        to_array(py, rows, &[flat.len(), self.dim()])
    }

    /// Whether each id is there, bool (n,).
    fn contains<'py>(&self, py: Python<'py>, ids: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyArray1<bool>>> {
        let ids = readonly::<i64>(ids, "ids", &[None])?;
        let flat = slice(&ids, "ids")?;
        let found = run::<_, VectorError>(py, || Ok(self.inner.contains(flat)))?;
        Ok(PyArray1::from_vec(py, found))
    }

    /// Bytes of pages, summaries, ids and maps.
    fn nbytes(&self, py: Python<'_>) -> PyResult<usize> {
        let stats = run::<_, VectorError>(py, || Ok(self.inner.stats()))?;
        Ok(stats.page_bytes + stats.index_bytes)
    }

    /// Counters: vectors, removed, segments, pages, tail, `page_bytes`, `index_bytes`, compactions.
    fn stats<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let stats = run::<_, VectorError>(py, || Ok(self.inner.stats()))?;
        let dict = PyDict::new(py);
        dict.set_item("vectors", stats.vectors)?;
        dict.set_item("removed", stats.removed)?;
        dict.set_item("segments", stats.segments)?;
        dict.set_item("pages", stats.pages)?;
        dict.set_item("tail", stats.tail)?;
        dict.set_item("page_bytes", stats.page_bytes)?;
        dict.set_item("index_bytes", stats.index_bytes)?;
        dict.set_item("compactions", stats.compactions)?;
        Ok(dict)
    }

    /// An independent index with the same content; pages are shared.
    fn copy(&self, py: Python<'_>) -> PyResult<Self> {
        let inner = run::<_, VectorError>(py, || Ok(self.inner.copy()))?;
        Ok(Self { inner })
    }

    /// Check every invariant; `RuntimeError` names the first one that does not hold.
    fn validate(&self, py: Python<'_>) -> PyResult<()> {
        run(py, || self.inner.validate())
    }

    /// The index as a file.
    fn to_bytes<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyBytes>> {
        let file = run::<_, VectorError>(py, || Ok(self.inner.to_bytes()))?;
        Ok(PyBytes::new(py, &file))
    }

    /// The index of a file that `to_bytes` made.
    #[staticmethod]
    fn from_bytes(py: Python<'_>, pool: &Bound<'_, Pool>, data: &Bound<'_, PyBytes>) -> PyResult<Self> {
        let (pool, bytes) = (&pool.get().inner, data.as_bytes());
        let inner = run(py, || core::VectorIndex::from_bytes(pool, bytes))?;
        Ok(Self { inner })
    }
}
