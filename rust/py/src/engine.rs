//! Search workers and the mailboxes through which a device asks them.
#![expect(clippy::needless_pass_by_value, reason = "PyO3 extracts lists by value")]

use std::collections::HashMap;
use std::time::Duration;

use icecache_core::{Dtype, SearchOptions};
use icecache_engine::{self as engine, EngineOptions, Fault, MailboxShape};
use numpy::ndarray::ArrayView1;
use numpy::{PyArray1, PyArrayDyn};
use pyo3::prelude::*;

use crate::arrays::{count, optional_count, to_array};
use crate::errors::{IntoPy, run};
use crate::forest::Forest;
use crate::memory::{HostMemory, positive};

/// Threads that search for a device, bound to cores.
///
/// Parameters
/// ----------
/// workers : int, optional
///     Search workers, 1..=256; default: `default_workers()`, which raises where that is 0.
/// `pin_threads` : bool
///     Bind them to cores.
/// `linger_us` : int
///     How long workers poll for the next step before they sleep, microseconds.
/// `patience_ms` : int
///     How long the end of a step waits for a worker that is still searching, milliseconds.
#[pyclass(frozen, module = "icecache._core")]
pub(crate) struct Engine {
    inner: engine::Engine,
}

#[pymethods]
impl Engine {
    #[new]
    #[pyo3(signature = (workers=None, *, pin_threads=true, linger_us=None, patience_ms=None))]
    fn new(
        py: Python<'_>,
        workers: Option<&Bound<'_, PyAny>>,
        pin_threads: bool,
        linger_us: Option<&Bound<'_, PyAny>>,
        patience_ms: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let defaults = EngineOptions::default();
        let linger = optional_count(linger_us, "linger_us")?.map(|us| Duration::from_micros(us as u64));
        let patience = optional_count(patience_ms, "patience_ms")?.map(|ms| Duration::from_millis(ms as u64));
        let options = EngineOptions {
            workers: optional_count(workers, "workers")?,
            pin_threads,
            linger: linger.unwrap_or(defaults.linger),
            patience: patience.unwrap_or(defaults.patience),
        };
        let inner = run(py, || engine::Engine::new(&options))?;
        Ok(Self { inner })
    }

    /// Search workers.
    #[getter]
    fn workers(&self) -> usize {
        self.inner.workers()
    }

    /// A mailbox for up to `n_rows` sequences of `n_layers` layers that search; `dtype` is that of the queries, and an
    /// answer has at most `capacity` pages per (row, KV head).
    #[pyo3(signature = (memory, *, n_layers, n_rows, n_kv_heads, group, key_dim, capacity, dtype))]
    #[expect(clippy::too_many_arguments, reason = "the keyword arguments of the Python function")]
    fn mailbox(
        slf: &Bound<'_, Self>,
        memory: &Bound<'_, HostMemory>,
        n_layers: &Bound<'_, PyAny>,
        n_rows: &Bound<'_, PyAny>,
        n_kv_heads: &Bound<'_, PyAny>,
        group: &Bound<'_, PyAny>,
        key_dim: &Bound<'_, PyAny>,
        capacity: &Bound<'_, PyAny>,
        dtype: &str,
    ) -> PyResult<Mailbox> {
        let shape = MailboxShape {
            layers: positive(n_layers, "n_layers")?,
            rows: positive(n_rows, "n_rows")?,
            heads: positive(n_kv_heads, "n_kv_heads")?,
            group: positive(group, "group")?,
            dim: positive(key_dim, "key_dim")?,
            capacity: positive(capacity, "capacity")?,
            dtype: Dtype::parse(dtype).map_err(|error| error.into_py(slf.py()))?,
        };
        let memory = &memory.get().inner;
        let engine = &slf.get().inner;
        let inner = run(slf.py(), || engine.mailbox(memory, shape))?;
        Ok(Mailbox { inner, _engine: slf.clone().unbind() })
    }
}

/// Memory through which a device posts queries and gets pages, and the steps that use it. Made by `Engine.mailbox`.
///
/// Calls may come from any thread; the device must have finished a step before `end_step`, `abort` or the end of the
/// mailbox.
#[pyclass(frozen, module = "icecache._core")]
pub(crate) struct Mailbox {
    inner: engine::Mailbox,
    /// Its workers live as long as it.
    _engine: Py<Engine>,
}

#[pymethods]
impl Mailbox {
    /// Its bytes, uint8, not copied; the array keeps the mailbox alive. What lies where: `arrays`.
    #[getter]
    fn memory<'py>(slf: &Bound<'py, Self>) -> Bound<'py, PyArray1<u8>> {
        let (start, bytes) = slf.get().inner.raw_memory();
        // SAFETY: the memory is initialised, and lives as long as the mailbox, which the array holds.
        let view = unsafe { ArrayView1::from_shape_ptr(bytes, start.as_ptr()) };
        // SAFETY: `slf` owns the memory. The array is writable, as the other side of the mailbox must be; the protocol
        // says who writes what and when.
        unsafe { PyArray1::borrow_from_array(&view, slf.clone().into_any()) }
    }

    /// Offset and distance between layers, bytes, of each array.
    #[getter]
    fn arrays(&self) -> HashMap<&'static str, (usize, usize)> {
        let arrays = self.inner.shape().named_arrays();
        arrays.into_iter().map(|(name, array)| (name, (array.offset, array.stride))).collect()
    }

    /// Set the sequences of a search layer, one per row, and how they are searched, from the next step on.
    #[pyo3(signature = (layer, forests, k, *, scaling, softcap=None, candidates=None, probe_mass=None, exact=false))]
    #[expect(clippy::too_many_arguments, reason = "the keyword arguments of the Python function")]
    fn bind(
        &self,
        py: Python<'_>,
        layer: &Bound<'_, PyAny>,
        forests: Vec<Bound<'_, Forest>>,
        k: &Bound<'_, PyAny>,
        scaling: f32,
        softcap: Option<f32>,
        candidates: Option<&Bound<'_, PyAny>>,
        probe_mass: Option<f32>,
        exact: bool,
    ) -> PyResult<()> {
        let candidates = optional_count(candidates, "candidates")?;
        let options = SearchOptions {
            k: count(k, "k")?,
            scaling,
            softcap,
            candidates,
            probe_mass,
            exact,
            estimate_unread: false,
        };
        let layer = count(layer, "layer")?;
        let forests = forests.iter().map(|forest| std::sync::Arc::clone(&forest.get().inner)).collect();
        run(py, || self.inner.bind(layer, forests, options))
    }

    /// Start a step and return its ticket, 1..2**32; workers answer from now on.
    ///
    /// With `refresh`, or after `bind`, it searches what the forests hold now; otherwise what the step before searched.
    #[pyo3(signature = (*, refresh=false))]
    fn begin_step(&self, py: Python<'_>, refresh: bool) -> PyResult<u32> {
        run(py, || self.inner.begin(refresh))
    }

    /// End the step, which the device has finished; raises what went wrong. Does nothing without a step in flight.
    fn end_step(&self, py: Python<'_>) -> PyResult<()> {
        run(py, || self.inner.end())
    }

    /// End the step, if there is one, whatever became of it. The device must have finished it.
    fn abort(&self, py: Python<'_>) -> PyResult<()> {
        run(py, || self.inner.abort())
    }

    /// Forget all sequences, so that their pages can be freed.
    fn unbind(&self, py: Python<'_>) -> PyResult<()> {
        run(py, || self.inner.unbind())
    }

    /// Of the last ended step, int64 (layers, 3), nanoseconds: when each request was seen and when it was answered, since
    /// the step began, and the longest search of one (row, head).
    fn times<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArrayDyn<i64>>> {
        let times = self.inner.times();
        let flat = times.iter().flat_map(|t| [t.seen_ns, t.answered_ns, t.longest_unit_ns]).map(|ns| ns as i64);
        to_array(py, flat.collect(), &[times.len(), 3])
    }

    /// Let a worker panic at this (layer, unit), or be busy for so long: for tests.
    #[pyo3(signature = (place, stall_ms=None))]
    fn _fault(&self, place: Option<(usize, usize)>, stall_ms: Option<u64>) {
        let fault = stall_ms.map_or(Fault::Panic, |ms| Fault::Stall(Duration::from_millis(ms)));
        self.inner.set_fault(place.map(|(layer, unit)| (layer, unit, fault)));
    }
}
