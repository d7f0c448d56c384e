//! Page stores and forests.
#![expect(clippy::needless_pass_by_value, reason = "PyO3 extracts lists by value")]

use std::sync::Arc;

use icecache_core::{self as core, Columns, Dtype, ExtendRow, PageLayout, Sealing, StoreOptions};
use numpy::{PyReadonlyArrayDyn, PyUntypedArrayMethods};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyDict;

use crate::arrays::{Target, count, optional_count, readonly, slice};
use crate::errors::{IntoPy, run};
use crate::memory::HostMemory;
use crate::pool::Pool;

/// Memory for pages of 16 keys and 16 values, shared by any number of forests.
///
/// Parameters
/// ----------
/// `key_dim`, `value_dim` : int
///     Elements of a key (1..=65536) and of a value (0..=65536; 0 stores keys only).
/// dtype : {"float32", "float16", "bfloat16"}
/// `limit_bytes` : int, optional
///     Most bytes of pages in use; a call that needs more raises `MemoryError` and changes nothing.
/// memory : `HostMemory`, optional
///     Where its memory comes from, in pieces of `slab_bytes`; default: the allocator of this process.
#[pyclass(frozen, module = "icecache._core")]
pub(crate) struct PageStore {
    pub(crate) inner: Arc<core::PageStore>,
}

#[pymethods]
impl PageStore {
    #[new]
    #[pyo3(signature = (key_dim, value_dim, dtype, *, limit_bytes=None, memory=None, slab_bytes=None, value_means=false))]
    #[expect(clippy::too_many_arguments, reason = "the arguments of the Python constructor")]
    fn new(
        py: Python<'_>,
        key_dim: &Bound<'_, PyAny>,
        value_dim: &Bound<'_, PyAny>,
        dtype: &str,
        limit_bytes: Option<&Bound<'_, PyAny>>,
        memory: Option<&Bound<'_, HostMemory>>,
        slab_bytes: Option<&Bound<'_, PyAny>>,
        value_means: bool,
    ) -> PyResult<Self> {
        let (key_dim, value_dim) = (count(key_dim, "key_dim")?, count(value_dim, "value_dim")?);
        let mut options =
            StoreOptions { limit_bytes: optional_count(limit_bytes, "limit_bytes")?, ..StoreOptions::default() };
        if let Some(memory) = memory {
            options.allocator = Box::new(memory.get().inner.clone());
        }
        if let Some(bytes) = optional_count(slab_bytes, "slab_bytes")? {
            options.slab_bytes = bytes;
        }
        let make = || {
            let layout = PageLayout::new(Dtype::parse(dtype)?, key_dim, value_dim)?;
            core::PageStore::new(if value_means { layout.with_value_means() } else { layout }, options)
        };
        make().map(|inner| Self { inner }).map_err(|error| error.into_py(py))
    }

    /// Elements of a key.
    #[getter]
    fn key_dim(&self) -> usize {
        self.inner.layout().key_dim
    }

    /// Elements of a value.
    #[getter]
    fn value_dim(&self) -> usize {
        self.inner.layout().value_dim
    }

    /// Element type.
    #[getter]
    fn dtype(&self) -> &'static str {
        self.inner.layout().dtype.name()
    }

    /// Whether mean values of pages are kept.
    #[getter]
    fn value_means(&self) -> bool {
        self.inner.layout().value_means
    }

    /// Bytes of a page.
    #[getter]
    fn page_bytes(&self) -> usize {
        self.inner.page_bytes()
    }

    /// Bytes of the pages in use.
    fn used_bytes(&self) -> usize {
        self.inner.used_bytes()
    }

    /// Bytes taken from the system.
    fn reserved_bytes(&self) -> usize {
        self.inner.reserved_bytes()
    }

    /// Count other memory, in whole pages, towards the limit until `discharge`; `MemoryError` if it is full.
    fn charge(&self, py: Python<'_>, n_bytes: &Bound<'_, PyAny>) -> PyResult<()> {
        let n_bytes = count(n_bytes, "n_bytes")?;
        run(py, || self.inner.charge(n_bytes))
    }

    /// End what `charge` began.
    fn discharge(&self, n_bytes: &Bound<'_, PyAny>) -> PyResult<()> {
        self.inner.discharge(count(n_bytes, "n_bytes")?);
        Ok(())
    }

    /// Begin the thread that packs aside; it inherits cores and priority of the calling thread.
    fn start_background(&self) {
        self.inner.start_background();
    }

    /// Take memory now for `n_bytes` more of pages, up to the limit: page-locking it later would delay a step.
    fn reserve(&self, py: Python<'_>, n_bytes: &Bound<'_, PyAny>) -> PyResult<()> {
        let n_bytes = count(n_bytes, "n_bytes")?;
        run(py, || self.inner.reserve_bytes(n_bytes))
    }
}

/// The keys and values of one sequence of one layer: a tree of pages per KV head, all of the same length.
///
/// Any number of threads may read, search and write at the same time; nobody waits for anybody.
///
/// Parameters
/// ----------
/// store : `PageStore`
/// `n_kv_heads` : int
///     1..=65536.
#[pyclass(frozen, module = "icecache._core")]
pub(crate) struct Forest {
    pub(crate) inner: Arc<core::Forest>,
}

impl Forest {
    /// Expected shape of `n` keys or values of every head, as bytes.
    fn rows_shape(&self, n: Option<usize>, row_bytes: usize) -> [Option<usize>; 3] {
        [Some(self.inner.n_heads()), n, Some(row_bytes)]
    }
}

#[pymethods]
impl Forest {
    #[new]
    fn new(py: Python<'_>, store: &Bound<'_, PageStore>, n_kv_heads: &Bound<'_, PyAny>) -> PyResult<Self> {
        let n_heads = count(n_kv_heads, "n_kv_heads")?;
        let store = Arc::clone(&store.get().inner);
        // Decoding never waits for packing, and a short context keeps well-packed pages.
        core::Forest::with_sealing(store, n_heads, Sealing::Tiers)
            .map(|inner| Self { inner: Arc::new(inner) })
            .map_err(|error| error.into_py(py))
    }

    /// KV heads.
    #[getter]
    fn n_kv_heads(&self) -> usize {
        self.inner.n_heads()
    }

    fn __len__(&self) -> usize {
        self.inner.len()
    }

    /// Pages of each head.
    fn n_pages(&self) -> Vec<usize> {
        self.inner.n_pages()
    }

    /// Add one token: `keys` uint8 (H, bytes) and `values` uint8 (H, bytes), a key and a value of every head. Returns its
    /// position. Every search that starts after this call finds it, in all threads.
    fn insert(&self, py: Python<'_>, keys: &Bound<'_, PyAny>, values: &Bound<'_, PyAny>) -> PyResult<usize> {
        let (layout, heads) = (self.inner.store().layout(), Some(self.inner.n_heads()));
        let keys = readonly::<u8>(keys, "keys", &[heads, Some(layout.key_bytes())])?;
        let values = readonly::<u8>(values, "values", &[heads, Some(layout.value_bytes())])?;
        let (keys, values) = (slice(&keys, "keys")?, slice(&values, "values")?);
        run(py, || self.inner.insert(keys, values))
    }

    /// Route all inserted tokens into the trees; searches see no difference, `digest` does.
    fn settle(&self, py: Python<'_>) -> PyResult<()> {
        run(py, || self.inner.settle())
    }

    /// A forest with the same tokens that shares all pages; neither sees tokens that the other adds later.
    fn fork(&self, py: Python<'_>) -> PyResult<Self> {
        let inner = run::<_, core::Error>(py, || Ok(self.inner.fork()))?;
        Ok(Self { inner: Arc::new(inner) })
    }

    /// A continuation that takes tokens unseen, until `adopt`.
    fn ahead(&self, py: Python<'_>) -> PyResult<Ahead> {
        run(py, || self.inner.ahead()).map(|inner| Ahead { inner })
    }

    /// Take over the tokens of a continuation of this forest, or of the one it was forked from; `False`, and nothing
    /// changes, if this forest changed since.
    fn adopt(&self, py: Python<'_>, ahead: &Bound<'_, Ahead>) -> PyResult<bool> {
        let ahead = &ahead.get().inner;
        run(py, || self.inner.adopt(ahead))
    }

    /// Keep the first `n_tokens` tokens.
    fn crop(&self, py: Python<'_>, n_tokens: &Bound<'_, PyAny>) -> PyResult<()> {
        let n = count(n_tokens, "n_tokens")?;
        run(py, || self.inner.crop(n))
    }

    /// Copy the keys and values of tokens start..stop to `out_keys` and `out_values`, uint8 (H, stop - start, bytes).
    ///
    /// With `key_at` or `value_at`: any columns of the rows instead, as many as the array has, from that byte of
    /// [key, value] on.
    #[pyo3(signature = (start, stop, out_keys, out_values, key_at=None, value_at=None))]
    #[expect(clippy::too_many_arguments, reason = "the arguments of the Python method")]
    fn read(
        &self,
        py: Python<'_>,
        start: &Bound<'_, PyAny>,
        stop: &Bound<'_, PyAny>,
        out_keys: &Bound<'_, PyAny>,
        out_values: &Bound<'_, PyAny>,
        key_at: Option<&Bound<'_, PyAny>>,
        value_at: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<()> {
        let (start, stop) = (count(start, "start")?, count(stop, "stop")?);
        let Some(n) = stop.checked_sub(start) else {
            return Err(PyValueError::new_err(format!("start: expected at most stop = {stop}, got {start}")));
        };
        let layout = self.inner.store().layout();
        let shape = [Some(self.inner.n_heads()), Some(n)];
        let mut keys =
            Target::new(out_keys, "out_keys", &shape, optional_count(key_at, "key_at")?, Columns::key(layout))?;
        let mut values = Target::new(
            out_values,
            "out_values",
            &shape,
            optional_count(value_at, "value_at")?,
            Columns::value(layout),
        )?;
        let (keys, values) = (keys.parts()?, values.parts()?);
        run(py, || self.inner.read_columns(start, stop, keys, values))
    }

    /// Check every invariant; `RuntimeError` names the first one that does not hold.
    fn validate(&self, py: Python<'_>) -> PyResult<()> {
        run(py, || self.inner.validate())
    }

    /// Bytes of the index beside the pages.
    fn index_bytes(&self, py: Python<'_>) -> PyResult<usize> {
        run::<_, core::Error>(py, || Ok(self.inner.index_bytes()))
    }

    /// What happened so far: inserts, splits, seals; and what there is: segments, `tail_tokens`. Summed over the heads.
    fn counters<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let counters = run::<_, core::Error>(py, || Ok(self.inner.counters()))?;
        let dict = PyDict::new(py);
        dict.set_item("inserts", counters.inserts)?;
        dict.set_item("splits", counters.splits)?;
        dict.set_item("seals", counters.seals)?;
        dict.set_item("segments", counters.segments)?;
        dict.set_item("tail_tokens", counters.tail_tokens)?;
        Ok(dict)
    }

    /// Hash of the whole structure: the layout of the pages and their bytes.
    fn digest(&self, py: Python<'_>) -> PyResult<u64> {
        run::<_, core::Error>(py, || Ok(self.inner.digest()))
    }
}

/// A sequence that continues a forest unseen until the forest adopts it. Made by `Forest.ahead`.
#[pyclass(frozen, module = "icecache._core")]
pub(crate) struct Ahead {
    inner: core::Ahead,
}

#[pymethods]
impl Ahead {
    /// The forest to add tokens to; it shares all pages with the one it continues.
    #[getter]
    fn forest(&self) -> Forest {
        Forest { inner: Arc::clone(self.inner.forest()) }
    }
}

/// Add tokens to many sequences: row r gets the keys and values uint8 (H, n, bytes) of the lists' r-th arrays.
///
/// All rows are checked first; on an error nothing has changed.
#[pyfunction]
pub(crate) fn extend(
    py: Python<'_>,
    pool: &Bound<'_, Pool>,
    forests: Vec<Bound<'_, Forest>>,
    keys: Vec<Bound<'_, PyAny>>,
    values: Vec<Bound<'_, PyAny>>,
) -> PyResult<()> {
    for (name, received) in [("keys", keys.len()), ("values", values.len())] {
        if received != forests.len() {
            let expected = forests.len();
            return Err(PyValueError::new_err(format!(
                "{name}: expected {expected} arrays, one per forest, got {received}"
            )));
        }
    }
    let mut borrowed: Vec<[PyReadonlyArrayDyn<'_, u8>; 2]> = Vec::with_capacity(forests.len());
    for (row, forest) in forests.iter().enumerate() {
        let forest = forest.get();
        let layout = forest.inner.store().layout();
        let row_keys =
            readonly::<u8>(&keys[row], &format!("keys[{row}]"), &forest.rows_shape(None, layout.key_bytes()))?;
        let n = row_keys.shape()[1];
        let shape = forest.rows_shape(Some(n), layout.value_bytes());
        borrowed.push([row_keys, readonly::<u8>(&values[row], &format!("values[{row}]"), &shape)?]);
    }
    let mut rows = Vec::with_capacity(forests.len());
    for (forest, [keys, values]) in forests.iter().zip(&borrowed) {
        rows.push(ExtendRow {
            forest: &forest.get().inner,
            keys: slice(keys, "keys")?,
            values: slice(values, "values")?,
        });
    }
    let pool = &pool.get().inner;
    run(py, || core::extend(pool, &rows))
}
