//! Host memory, page-locked where a device reads it in place.

use std::sync::Arc;

use icecache_engine::{self as engine, MemoryOptions, Pin, SimulatedRegistrar};
use numpy::PyArray1;
use numpy::ndarray::ArrayView1;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;

use crate::arrays::{count, optional_count};
use crate::errors::run;
use crate::pool::Pool;

/// Memory for the pages and mailboxes of one runtime, given back when its last user goes.
///
/// Parameters
/// ----------
/// pool : Pool
///     Its threads touch large pieces first, so that they land on the NUMA nodes the threads run on.
/// pin : {"never", "auto", "always", "simulated"}
///     Whether it is page-locked for CUDA device `device`: never; if that works, `fallback_reason()` says why not; or else
///     an error. "simulated" keeps the books without a device, for tests.
/// `limit_bytes` : int, optional
///     Most bytes held at a time; more raises `MemoryError`.
/// device : int
///     Ordinal of the CUDA device.
/// `simulated_limit` : int, optional
///     Most bytes that the simulated device accepts.
#[pyclass(frozen, module = "icecache._core")]
pub(crate) struct HostMemory {
    pub(crate) inner: engine::HostMemory,
}

#[pymethods]
impl HostMemory {
    #[new]
    #[pyo3(signature = (pool, *, pin="never", limit_bytes=None, device=None, simulated_limit=None))]
    fn new(
        py: Python<'_>,
        pool: &Bound<'_, Pool>,
        pin: &str,
        limit_bytes: Option<&Bound<'_, PyAny>>,
        device: Option<&Bound<'_, PyAny>>,
        simulated_limit: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let limit_bytes = optional_count(limit_bytes, "limit_bytes")?;
        let device = optional_count(device, "device")?.unwrap_or(0);
        let simulated_limit = optional_count(simulated_limit, "simulated_limit")?.unwrap_or(usize::MAX);
        let pin = match pin {
            "never" => Pin::Never,
            "auto" => Pin::Prefer(device),
            "always" => Pin::Require(device),
            "simulated" => Pin::With { registrar: Arc::new(SimulatedRegistrar::new(simulated_limit)), required: false },
            _ => {
                return Err(PyValueError::new_err(format!(
                    "pin: expected never, auto, always or simulated, got {pin}"
                )));
            }
        };
        let pool = Arc::clone(&pool.get().inner);
        let inner = run(py, || engine::HostMemory::new(MemoryOptions { limit_bytes, pin }, Some(pool)))?;
        Ok(Self { inner })
    }

    /// Lend zeroed memory of at least `n_bytes`, uint8, not copied; it is given back with the last array that views it.
    ///
    /// `MemoryError` if the limit or the machine leaves no room.
    fn lend<'py>(&self, py: Python<'py>, n_bytes: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyArray1<u8>>> {
        let bytes = positive(n_bytes, "n_bytes")?;
        let block = Bound::new(py, HostBlock { inner: run(py, || self.inner.allocate(bytes))? })?;
        let (start, bytes) = (block.get().inner.start(), block.get().inner.bytes());
        // SAFETY: the memory is zeroed, and lives as long as the block, which the array holds.
        let view = unsafe { ArrayView1::from_shape_ptr(bytes, start.as_ptr()) };
        // SAFETY: `block` owns the memory, and nobody else knows it.
        Ok(unsafe { PyArray1::borrow_from_array(&view, block.into_any()) })
    }

    /// Bytes held now.
    fn reserved_bytes(&self) -> usize {
        self.inner.reserved_bytes()
    }

    /// Bytes held now that are page-locked.
    fn pinned_bytes(&self) -> usize {
        self.inner.pinned_bytes()
    }

    /// Seconds spent on committing and page-locking so far.
    fn pin_seconds(&self) -> f64 {
        self.inner.pin_time().as_secs_f64()
    }

    /// Whether a device can read all of it in place.
    fn is_pinned(&self) -> bool {
        self.inner.is_pinned()
    }

    /// Why memory that should have been page-locked is pageable; None: nothing of the kind happened.
    fn fallback_reason(&self) -> Option<String> {
        self.inner.fallback_reason()
    }
}

/// Plain memory on loan from a `HostMemory`. Made by `HostMemory.lend`.
#[pyclass(frozen, module = "icecache._core")]
pub(crate) struct HostBlock {
    inner: engine::Block,
}

/// Search workers that suit this machine; 0: fewer cores than a step with polling workers needs.
#[pyfunction]
pub(crate) fn default_workers() -> usize {
    engine::default_workers(&engine::Topology::detect())
}

/// Cores that search workers leave to everything else on this machine.
#[pyfunction]
pub(crate) fn spare_cores() -> Vec<usize> {
    engine::spare_cores(&engine::Topology::detect())
}

/// Logical cores and physical cores of this process, and their NUMA nodes.
#[pyfunction]
pub(crate) fn topology() -> (usize, usize, usize) {
    let topology = engine::Topology::detect();
    (topology.cores.len(), topology.physical.len(), topology.numa_nodes)
}

/// A count that has to be positive.
pub(crate) fn positive(value: &Bound<'_, PyAny>, name: &str) -> PyResult<usize> {
    match count(value, name)? {
        0 => Err(PyValueError::new_err(format!("{name}: expected a positive number, got 0"))),
        n => Ok(n),
    }
}
