//! Worker threads.

use std::sync::Arc;
use std::thread::available_parallelism;

use icecache_core::instruction_set;
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use rayon::{ThreadPool, ThreadPoolBuilder};

use crate::arrays::optional_count;
use crate::errors::IntoPy;

/// More is a mistake: a typo in an environment variable should not start thousands of threads.
const MAX_THREADS: usize = 1024;

/// Worker threads for the calls that take a pool; nothing uses Rayon's global one.
///
/// Parameters
/// ----------
/// threads : int, optional
///     1..=1024. Default: `ICECACHE_NUM_THREADS`, or the cores this process may use.
#[pyclass(frozen, module = "icecache._core")]
pub(crate) struct Pool {
    pub(crate) inner: Arc<ThreadPool>,
}

#[pymethods]
impl Pool {
    #[new]
    #[pyo3(signature = (threads=None))]
    fn new(py: Python<'_>, threads: Option<&Bound<'_, PyAny>>) -> PyResult<Self> {
        let threads = match optional_count(threads, "threads")? {
            Some(threads) => threads,
            None => default_threads()?,
        };
        if !(1..=MAX_THREADS).contains(&threads) {
            return Err(PyValueError::new_err(format!("threads: expected 1..={MAX_THREADS}, got {threads}")));
        }
        let build = || ThreadPoolBuilder::new().num_threads(threads).thread_name(|n| format!("icecache-{n}")).build();
        let inner = py.detach(build).map_err(|error| PyRuntimeError::new_err(error.to_string()))?;
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Number of worker threads.
    #[getter]
    fn threads(&self) -> usize {
        self.inner.current_num_threads()
    }

    fn __repr__(&self) -> String {
        format!("Pool(threads={})", self.threads())
    }
}

fn default_threads() -> PyResult<usize> {
    match std::env::var("ICECACHE_NUM_THREADS") {
        Ok(text) => text.trim().parse().map_err(|_| {
            PyValueError::new_err(format!("ICECACHE_NUM_THREADS: expected a number of threads, got {text:?}"))
        }),
        Err(_) => Ok(available_parallelism().map_or(1, usize::from).min(MAX_THREADS)),
    }
}

/// Name of the instruction set that the loops use on this machine.
#[pyfunction]
pub(crate) fn simd(py: Python<'_>) -> PyResult<&'static str> {
    instruction_set().map_err(|error| error.into_py(py))
}
