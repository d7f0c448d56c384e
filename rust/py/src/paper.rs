//! M-DCI as published, for comparison: which tokens a step would read.
#![expect(clippy::needless_pass_by_value, reason = "PyO3 extracts lists by value")]

use std::sync::{Arc, Mutex, PoisonError};

use icecache_core::paper::{Field, Mdci, MdciOptions, Scratch};
use icecache_core::{self as core, PAGE_TOKENS};
use numpy::{PyArrayDyn, PyUntypedArrayMethods};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use rayon::prelude::*;

use crate::arrays::{count, readonly, slice, to_array};
use crate::errors::run;
use crate::forest::PageStore;
use crate::pool::Pool;

/// The keys of one sequence of one layer in trees of the published method, one per KV head. Searches and writes wait for
/// each other.
///
/// Parameters
/// ----------
/// store : `PageStore`
///     With `value_dim` 0: values are not read here.
/// `n_kv_heads` : int
///     1..=65536.
#[pyclass(frozen, module = "icecache._core")]
pub(crate) struct PaperForest {
    store: Arc<core::PageStore>,
    trees: Vec<Mutex<Mdci>>,
}

#[pymethods]
impl PaperForest {
    #[new]
    fn new(py: Python<'_>, store: &Bound<'_, PageStore>, n_kv_heads: &Bound<'_, PyAny>) -> PyResult<Self> {
        let n_heads = count(n_kv_heads, "n_kv_heads")?;
        if !(1..=65_536).contains(&n_heads) {
            return Err(PyValueError::new_err(format!("n_kv_heads: expected 1..=65536, got {n_heads}")));
        }
        let store = Arc::clone(&store.get().inner);
        if store.layout().value_dim != 0 {
            let got = store.layout().value_dim;
            return Err(PyValueError::new_err(format!("store: expected value_dim 0, got {got}")));
        }
        let options = MdciOptions::for_dtype(store.layout().dtype);
        let tree = || Mdci::new(Arc::clone(&store), options.clone()).map(Mutex::new);
        let trees = run(py, || (0..n_heads).map(|_| tree()).collect::<Result<_, _>>())?;
        Ok(Self { store, trees })
    }

    /// Tokens of each head.
    fn __len__(&self) -> usize {
        self.trees.first().map_or(0, |tree| lock(tree).len())
    }

    /// Add keys uint8 (H, n, bytes): a bulk build if there are none yet, one by one otherwise.
    fn extend(&self, py: Python<'_>, pool: &Bound<'_, Pool>, keys: &Bound<'_, PyAny>) -> PyResult<()> {
        let bytes = self.store.layout().key_bytes();
        let keys = readonly::<u8>(keys, "keys", &[Some(self.trees.len()), None, Some(bytes)])?;
        let per_head = keys.shape()[1] * bytes;
        let keys = slice(&keys, "keys")?;
        if per_head == 0 {
            return Ok(());
        }
        let pool = &pool.get().inner;
        run(py, || {
            let one = |(tree, keys): (&Mutex<Mdci>, &[u8])| -> core::Result<()> {
                let mut tree = lock(tree);
                if !tree.is_empty() {
                    return tree.insert(keys, &[]);
                }
                let options = MdciOptions::for_dtype(self.store.layout().dtype);
                *tree = Mdci::build(pool, Arc::clone(&self.store), options, keys, &[])?;
                Ok(())
            };
            pool.install(|| self.trees.par_iter().zip(keys.par_chunks_exact(per_head)).try_for_each(one))
        })
    }
}

/// Tokens of the `k` best pages of every KV head, int32 (R, H, 16 k), -1 behind the last: one search per query of
/// float32 (R, H, G, dim) with the authors' field of view, ranked lists interleaved over the group.
#[pyfunction]
pub(crate) fn paper_search<'py>(
    py: Python<'py>,
    pool: &Bound<'py, Pool>,
    forests: Vec<Bound<'py, PaperForest>>,
    queries: &Bound<'py, PyAny>,
    k: &Bound<'py, PyAny>,
) -> PyResult<Bound<'py, PyArrayDyn<i32>>> {
    let k = count(k, "k")?;
    let Some(first) = forests.first().map(Bound::get) else {
        return Err(PyValueError::new_err("forests: expected at least one, got none"));
    };
    let (n_heads, dim) = (first.trees.len(), first.store.layout().key_dim);
    let shape = [Some(forests.len()), Some(n_heads), None, Some(dim)];
    let queries = readonly::<f32>(queries, "queries", &shape)?;
    let per_head = queries.shape()[2] * dim;
    let queries = slice(&queries, "queries")?;
    let mut trees = Vec::with_capacity(forests.len() * n_heads);
    for forest in &forests {
        let forest = forest.get();
        if forest.trees.len() != n_heads || forest.store.layout().key_dim != dim {
            return Err(PyValueError::new_err("forests: expected the same KV heads and key_dim in all of them"));
        }
        trees.extend(&forest.trees);
    }
    let Some(width) = k.checked_mul(PAGE_TOKENS).filter(|width| *width <= 1 << 24 && per_head > 0) else {
        return Err(PyValueError::new_err(format!("k: expected at most 2**20, and a query per head, got {k}")));
    };
    let pool = &pool.get().inner;
    let tokens = run(py, || {
        let mut tokens = vec![-1_i32; trees.len() * width];
        let one = |(i, out): (usize, &mut [i32])| -> core::Result<()> {
            let (tree, queries) = (lock(trees[i]), &queries[i * per_head..][..per_head]);
            let field = Field::for_tokens(tree.len());
            let found = tree.search_tokens(queries, k, field, &mut Scratch::default())?;
            out.iter_mut().zip(found).for_each(|(out, token)| *out = token.0 as i32);
            Ok(())
        };
        let rows = || tokens.par_chunks_exact_mut(width.max(1)).enumerate().try_for_each(one);
        pool.install(rows).map(|()| tokens)
    })?;
    to_array(py, tokens, &[forests.len(), n_heads, width])
}

/// A tree that a panic left locked is still a tree: writes check their input first.
fn lock(tree: &Mutex<Mdci>) -> std::sync::MutexGuard<'_, Mdci> {
    tree.lock().unwrap_or_else(PoisonError::into_inner)
}
