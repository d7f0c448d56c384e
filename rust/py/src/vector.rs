//! The standalone index; `icecache.Index` is the friendly side of it.

use std::path::PathBuf;

use icecache_core::PAGE_TOKENS;
use icecache_core::vector::{
    self as core, Addition, Effort, Metric, Neighbours, OnConflict, PageSearch, VectorConfig, VectorError,
};
use numpy::{Element, PyArray1, PyArrayDyn, PyUntypedArrayMethods};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};
use rayon::ThreadPool;

use crate::arrays::{checked, count, optional_count, readonly, readwrite, slice, slice_mut, to_array};
use crate::errors::{IntoPy, run};
use crate::pool::Pool;
use crate::vectors::{Filter, Matrix, run_reporting};

/// Ids and distances of a search.
type Found<'py> = (Bound<'py, PyArrayDyn<i64>>, Bound<'py, PyArrayDyn<f32>>);

/// Limits, ids, distances.
type RangeColumns<'py> = (Bound<'py, PyArray1<i64>>, Bound<'py, PyArray1<i64>>, Bound<'py, PyArray1<f32>>);

/// Pages, recalls, standard errors.
type RecallColumns<'py> = (Bound<'py, PyArray1<i64>>, Bound<'py, PyArray1<f32>>, Bound<'py, PyArray1<f32>>);

/// Pages, scores, mass.
type PageMatches<'py> = (Bound<'py, PyArrayDyn<i32>>, Bound<'py, PyArrayDyn<f32>>, Bound<'py, PyArray1<f32>>);

/// See [`VectorIndex::pages`].
type PageColumns<'py> = (
    Bound<'py, PyArrayDyn<i64>>,
    Bound<'py, PyArray1<u8>>,
    Bound<'py, PyArrayDyn<f32>>,
    Bound<'py, PyArray1<f32>>,
    Bound<'py, PyArray1<u32>>,
);

/// Queries searched between two looks at signals: some tens of milliseconds on one thread.
const QUERY_BLOCK: usize = 1024;

/// Vectors with ids, searched by inner product, squared L2 or cosine.
///
/// Parameters
/// ----------
/// dim : int
///     1..=65536.
/// metric : {"ip", "l2", "cosine"}
/// dtype : {"float32", "float16", "bfloat16", "int8"}
/// center : bool, default=True
/// seed : int, default=0
/// codes : bool, default=True
#[pyclass(frozen, module = "icecache._core")]
pub(crate) struct VectorIndex {
    inner: core::VectorIndex,
}

#[pymethods]
impl VectorIndex {
    #[new]
    #[pyo3(signature = (dim, metric, dtype, center=true, seed=None, codes=true))]
    fn new(
        py: Python<'_>,
        dim: &Bound<'_, PyAny>,
        metric: &str,
        dtype: &str,
        center: bool,
        seed: Option<&Bound<'_, PyAny>>,
        codes: bool,
    ) -> PyResult<Self> {
        let dim = count(dim, "dim")?;
        let seed = optional_count(seed, "seed")?.unwrap_or(0) as u64;
        let make = || {
            let (metric, dtype) = (Metric::from_name(metric)?, VectorConfig::dtype_from_name(dtype)?);
            core::VectorIndex::new(VectorConfig { dim, metric, dtype, center, seed, codes })
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

    /// Whether 4-bit codes of the vectors are kept where they pay.
    #[getter]
    fn codes(&self) -> bool {
        self.inner.config().codes
    }

    fn __len__(&self) -> usize {
        self.inner.len()
    }

    /// Whether it is a snapshot or a mapped file.
    #[getter]
    fn read_only(&self) -> bool {
        self.inner.is_read_only()
    }

    /// What is subtracted from every vector before it is stored, float32 (dim,).
    fn mean<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<f32>> {
        PyArray1::from_slice(py, &self.inner.mean())
    }

    /// Add vectors (n, dim), float32, float64, float16 or, as uint16, bfloat16, under the given ids, int64 (n,), or the
    /// next free ones; returns the ids. `progress(done, total)` is called now and then; `False` cancels.
    #[pyo3(signature = (pool, ids, vectors, on_conflict, progress=None))]
    fn add<'py>(
        &self,
        py: Python<'py>,
        pool: &Bound<'_, Pool>,
        ids: Option<&Bound<'py, PyAny>>,
        vectors: &Bound<'py, PyAny>,
        on_conflict: &str,
        progress: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyArray1<i64>>> {
        let on_conflict = OnConflict::from_name(on_conflict).map_err(|error| error.into_py(py))?;
        let vectors = Matrix::borrow(vectors, "vectors", self.dim())?;
        let ids = ids.map(|ids| readonly::<i64>(ids, "ids", &[Some(vectors.rows())])).transpose()?;
        let ids = ids.as_ref().map(|ids| slice(ids, "ids")).transpose()?;
        let addition = Addition { vectors: vectors.numbers("vectors")?, ids, on_conflict };
        let pool = &pool.get().inner;
        let added = run_reporting(py, progress, |report| self.inner.add(pool, addition, Some(report)))?;
        Ok(PyArray1::from_vec(py, added))
    }

    /// Ids, int64 (n, k), and distances, float32 (n, k), of the nearest vectors of queries, float32 (n, dim); written
    /// to `out` if given.
    #[pyo3(signature = (pool, queries, k, *, beam=None, recall=None, exact=false, filter=None, out=None))]
    #[expect(clippy::too_many_arguments, reason = "keyword arguments of a Python method")]
    fn search<'py>(
        &self,
        py: Python<'py>,
        pool: Option<&Bound<'_, Pool>>,
        queries: &Bound<'py, PyAny>,
        k: &Bound<'_, PyAny>,
        beam: Option<&Bound<'_, PyAny>>,
        recall: Option<f64>,
        exact: bool,
        filter: Option<&Bound<'_, Filter>>,
        out: Option<(Bound<'py, PyAny>, Bound<'py, PyAny>)>,
    ) -> PyResult<Found<'py>> {
        let (k, beam) = (count(k, "k")?, optional_count(beam, "beam")?);
        let queries = readonly::<f32>(queries, "queries", &[None, Some(self.dim())])?;
        let shape = [queries.shape()[0], k];
        let (rows, pool) = (slice(&queries, "queries")?, pool.map(|pool| &*pool.get().inner));
        let effort = Effort { beam, recall, exact, filter: filter.map(|filter| &filter.get().inner) };
        let found = search_in_blocks(py, &self.inner, pool, rows, k, effort)?;
        let Some((ids, distances)) = out else {
            return Ok((to_array(py, found.ids, &shape)?, to_array(py, found.distances, &shape)?));
        };
        Ok((write(&ids, "out[0]", &shape, &found.ids)?, write(&distances, "out[1]", &shape, &found.distances)?))
    }

    /// Take a sample of queries, float32 (n, dim), as what recall is measured with; an empty one: stored vectors.
    fn set_sample(&self, py: Python<'_>, queries: &Bound<'_, PyAny>) -> PyResult<()> {
        let queries = readonly::<f32>(queries, "queries", &[None, Some(self.dim())])?;
        let rows = slice(&queries, "queries")?;
        run(py, || self.inner.set_sample(rows))
    }

    /// Pages per query, int64 (n,), the recall of the `k` nearest with so many and its standard error, float32 (n,).
    fn calibrate<'py>(
        &self,
        py: Python<'py>,
        pool: Option<&Bound<'_, Pool>>,
        k: &Bound<'_, PyAny>,
    ) -> PyResult<RecallColumns<'py>> {
        let (k, pool) = (count(k, "k")?, pool.map(|pool| &*pool.get().inner));
        let points = run(py, || self.inner.calibrate(pool, k))?;
        let beams = points.iter().map(|point| point.beam as i64).collect();
        let (recalls, errors) = points.iter().map(|point| (point.recall, point.error)).unzip();
        Ok((PyArray1::from_vec(py, beams), PyArray1::from_vec(py, recalls), PyArray1::from_vec(py, errors)))
    }

    /// `(lims, ids, distances)` of the vectors within `radius` of queries, float32 (n, dim): int64 (n + 1,), int64 and
    /// float32 (lims[-1],).
    #[pyo3(signature = (pool, queries, radius, *, beam=None, filter=None, max_results=None))]
    #[expect(clippy::too_many_arguments, reason = "keyword arguments of a Python method")]
    fn range_search<'py>(
        &self,
        py: Python<'py>,
        pool: Option<&Bound<'_, Pool>>,
        queries: &Bound<'py, PyAny>,
        radius: f32,
        beam: Option<&Bound<'_, PyAny>>,
        filter: Option<&Bound<'_, Filter>>,
        max_results: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<RangeColumns<'py>> {
        let (beam, most) = (optional_count(beam, "beam")?, optional_count(max_results, "max_results")?);
        let queries = readonly::<f32>(queries, "queries", &[None, Some(self.dim())])?;
        let (rows, pool) = (slice(&queries, "queries")?, pool.map(|pool| &*pool.get().inner));
        let effort = Effort { beam, filter: filter.map(|filter| &filter.get().inner), ..Effort::default() };
        let found = run(py, || self.inner.range_search(pool, rows, radius, most, effort))?;
        let (limits, ids) = (PyArray1::from_vec(py, found.limits), PyArray1::from_vec(py, found.ids));
        Ok((limits, ids, PyArray1::from_vec(py, found.distances)))
    }

    /// `(pages, scores, mass)` for queries, float32 (n, dim), in groups: int32 and float32 (n / group, `n_pages`), float32
    /// (n,).
    #[pyo3(signature = (pool, queries, n_pages, *, group=1, scaling=None, exact=false))]
    #[expect(clippy::too_many_arguments, reason = "keyword arguments of a Python method")]
    fn search_pages<'py>(
        &self,
        py: Python<'py>,
        pool: Option<&Bound<'_, Pool>>,
        queries: &Bound<'py, PyAny>,
        n_pages: &Bound<'_, PyAny>,
        group: usize,
        scaling: Option<f32>,
        exact: bool,
    ) -> PyResult<PageMatches<'py>> {
        let n_pages = count(n_pages, "n_pages")?;
        let queries = readonly::<f32>(queries, "queries", &[None, Some(self.dim())])?;
        let shape = [queries.shape()[0] / group.max(1), n_pages];
        let (rows, pool) = (slice(&queries, "queries")?, pool.map(|pool| &*pool.get().inner));
        let search = PageSearch { n_pages, group, scaling, exact };
        let found = run(py, || self.inner.search_pages(pool, rows, search))?;
        let mass = PyArray1::from_vec(py, found.mass);
        Ok((to_array(py, found.pages, &shape)?, to_array(py, found.scores, &shape)?, mass))
    }

    /// Columns of all pages: ids int64 (n, 16), counts uint8 (n,), means float32 (n, dim), spreads float32 (n,),
    /// generations uint32 (n,).
    fn pages<'py>(&self, py: Python<'py>) -> PyResult<PageColumns<'py>> {
        let pages = run(py, || self.inner.pages())?;
        let n = pages.counts.len();
        Ok((
            to_array(py, pages.ids, &[n, PAGE_TOKENS])?,
            PyArray1::from_vec(py, pages.counts),
            to_array(py, pages.means, &[n, self.dim()])?,
            PyArray1::from_vec(py, pages.spreads),
            PyArray1::from_vec(py, pages.generations),
        ))
    }

    /// Remove ids, int64 (n,); returns how many there were. With `strict`, a missing one is a `KeyError`.
    fn remove(&self, py: Python<'_>, pool: &Bound<'_, Pool>, ids: &Bound<'_, PyAny>, strict: bool) -> PyResult<usize> {
        let ids = readonly::<i64>(ids, "ids", &[None])?;
        let (ids, pool) = (slice(&ids, "ids")?, &pool.get().inner);
        run(py, || self.inner.remove(pool, ids, strict))
    }

    /// Vectors by id, float32 (n, dim); written to `out` if given.
    #[pyo3(signature = (ids, out=None))]
    fn get<'py>(
        &self,
        py: Python<'py>,
        ids: &Bound<'py, PyAny>,
        out: Option<&Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyArrayDyn<f32>>> {
        let ids = readonly::<i64>(ids, "ids", &[None])?;
        let flat = slice(&ids, "ids")?;
        let shape = [flat.len(), self.dim()];
        let mut rows = vec![0.0; shape[0] * shape[1]];
        run(py, || self.inner.get(flat, &mut rows))?;
        match out {
            None => to_array(py, rows, &shape),
            Some(out) => write(out, "out", &shape, &rows),
        }
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

    /// The read-only index of this moment; shares everything.
    fn snapshot(&self) -> Self {
        Self { inner: self.inner.snapshot() }
    }

    /// Pack all vectors again, as one bulk addition would.
    #[pyo3(signature = (pool, progress=None))]
    fn compact(&self, py: Python<'_>, pool: &Bound<'_, Pool>, progress: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
        let pool = &pool.get().inner;
        run_reporting(py, progress, |report| self.inner.compact(pool, Some(report)))
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

    /// Write the index to a new file that then replaces `path`.
    fn save(&self, py: Python<'_>, path: PathBuf) -> PyResult<()> {
        run(py, move || self.inner.save(&path).map_err(VectorError::from))
    }

    /// The index of a file in memory, uint8 (n,), copied.
    #[staticmethod]
    fn from_bytes(py: Python<'_>, pool: &Bound<'_, Pool>, data: &Bound<'_, PyAny>) -> PyResult<Self> {
        let data = readonly::<u8>(data, "data", &[None])?;
        let (pool, bytes) = (&pool.get().inner, slice(&data, "data")?);
        let inner = run(py, || core::VectorIndex::from_bytes(pool, bytes))?;
        Ok(Self { inner })
    }

    /// Map a file: a read-only index. With `verify`, all of it is read and checked, else all but its pages.
    #[staticmethod]
    fn open_mapped(py: Python<'_>, pool: &Bound<'_, Pool>, path: PathBuf, verify: bool) -> PyResult<Self> {
        let pool = &pool.get().inner;
        let inner = run(py, move || core::VectorIndex::open_mapped(pool, &path, verify))?;
        Ok(Self { inner })
    }
}

/// Copies a result to an array of the caller.
fn write<'py, T: Element + Copy>(
    out: &Bound<'py, PyAny>,
    name: &str,
    shape: &[usize; 2],
    values: &[T],
) -> PyResult<Bound<'py, PyArrayDyn<T>>> {
    let axes = shape.map(Some);
    let array = checked::<T>(out, name, &axes)?;
    slice_mut(&mut readwrite::<T>(out, name, &axes)?, name)?.copy_from_slice(values);
    Ok(array)
}

/// Searches one snapshot, a block of queries at a time; signals are handled in between.
fn search_in_blocks(
    py: Python<'_>,
    index: &core::VectorIndex,
    pool: Option<&ThreadPool>,
    queries: &[f32],
    k: usize,
    effort: Effort<'_>,
) -> PyResult<Neighbours> {
    let (dim, snapshot) = (index.config().dim, index.snapshot());
    if queries.len() <= QUERY_BLOCK * dim {
        return run(py, || snapshot.search(pool, queries, k, effort));
    }
    let mut found = run(py, || Neighbours::reserve(queries.len() / dim, k))?;
    run(py, || snapshot.check_queries(queries))?;
    for (block, queries) in queries.chunks(QUERY_BLOCK * dim).enumerate() {
        let piece = run(py, || snapshot.search(pool, queries, k, effort))?;
        let start = block * QUERY_BLOCK * k;
        found.ids[start..start + piece.ids.len()].copy_from_slice(&piece.ids);
        found.distances[start..start + piece.ids.len()].copy_from_slice(&piece.distances);
        py.check_signals()?;
    }
    Ok(found)
}
