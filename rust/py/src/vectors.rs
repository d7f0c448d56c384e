//! Arguments of the standalone index: vectors of several types, filters, progress callbacks.

use std::ops::ControlFlow;

use half::slice::HalfBitsSliceExt;
use half::{bf16, f16};
use icecache_core::vector::{Filter as CoreFilter, Numbers, VectorError};
use numpy::{PyArrayDescrMethods, PyReadonlyArrayDyn, PyUntypedArray, PyUntypedArrayMethods, dtype};
use pyo3::exceptions::PyTypeError;
use pyo3::prelude::*;

use crate::arrays::{readonly, slice};
use crate::errors::{IntoPy, run_raw};

/// A borrowed matrix of vectors; `uint16` stands for bfloat16, which NumPy does not have.
pub(crate) enum Matrix<'py> {
    F32(PyReadonlyArrayDyn<'py, f32>),
    F64(PyReadonlyArrayDyn<'py, f64>),
    F16(PyReadonlyArrayDyn<'py, f16>),
    Bf16(PyReadonlyArrayDyn<'py, u16>),
}

impl<'py> Matrix<'py> {
    /// Checks dtype, shape `(n, dim)` and order, and borrows.
    pub(crate) fn borrow(value: &Bound<'py, PyAny>, name: &str, dim: usize) -> PyResult<Self> {
        let py = value.py();
        let Ok(array) = value.cast::<PyUntypedArray>() else {
            let got = value.get_type().name()?;
            return Err(PyTypeError::new_err(format!("{name}: expected a NumPy array, got {got}")));
        };
        let (kind, shape) = (array.dtype(), [None, Some(dim)]);
        if kind.is_equiv_to(&dtype::<f64>(py)) {
            Ok(Self::F64(readonly(value, name, &shape)?))
        } else if kind.is_equiv_to(&dtype::<f16>(py)) {
            Ok(Self::F16(readonly(value, name, &shape)?))
        } else if kind.is_equiv_to(&dtype::<u16>(py)) {
            Ok(Self::Bf16(readonly(value, name, &shape)?))
        } else {
            // Everything else is refused as not being float32.
            Ok(Self::F32(readonly(value, name, &shape)?))
        }
    }

    pub(crate) fn numbers(&self, name: &str) -> PyResult<Numbers<'_>> {
        Ok(match self {
            Self::F32(array) => Numbers::F32(slice(array, name)?),
            Self::F64(array) => Numbers::F64(slice(array, name)?),
            Self::F16(array) => Numbers::F16(slice(array, name)?),
            Self::Bf16(array) => Numbers::Bf16(slice(array, name)?.reinterpret_cast::<bf16>()),
        })
    }

    pub(crate) fn rows(&self) -> usize {
        match self {
            Self::F32(array) => array.shape()[0],
            Self::F64(array) => array.shape()[0],
            Self::F16(array) => array.shape()[0],
            Self::Bf16(array) => array.shape()[0],
        }
    }
}

/// Which ids a search may return; made once, used with any index. Its masks are kept for the state of the index that
/// it was last used with.
///
/// Parameters
/// ----------
/// allowed : int64 array or bool array, (n,)
///     The allowed ids, or `allowed[id]` for every id.
#[pyclass(frozen, module = "icecache._core")]
pub(crate) struct Filter {
    pub(crate) inner: CoreFilter,
}

#[pymethods]
impl Filter {
    #[new]
    fn new(allowed: &Bound<'_, PyAny>) -> PyResult<Self> {
        let mask =
            allowed.cast::<PyUntypedArray>().is_ok_and(|array| array.dtype().is_equiv_to(&dtype::<bool>(allowed.py())));
        let inner = if mask {
            let allowed = readonly::<bool>(allowed, "filter", &[None])?;
            CoreFilter::mask(slice(&allowed, "filter")?)
        } else {
            let allowed = readonly::<i64>(allowed, "filter", &[None])?;
            CoreFilter::ids(slice(&allowed, "filter")?)
        };
        Ok(Self { inner })
    }
}

/// Runs long work without the GIL. Between its pieces, signals are handled and `progress(done, total)` is called; work
/// stops when either raises or the callback returns `False`.
pub(crate) fn run_reporting<T: Send>(
    py: Python<'_>,
    progress: Option<&Bound<'_, PyAny>>,
    work: impl FnOnce(&mut (dyn FnMut(usize, usize) -> ControlFlow<()> + Send)) -> Result<T, VectorError> + Send,
) -> PyResult<T> {
    let progress = progress.map(|callback| callback.clone().unbind());
    let mut raised = None;
    let mut report = |done: usize, total: usize| {
        let go_on = Python::attach(|py| -> PyResult<bool> {
            py.check_signals()?;
            let Some(callback) = &progress else { return Ok(true) };
            let answer = callback.bind(py).call1((done, total))?;
            Ok(answer.is_none() || answer.is_truthy()?)
        });
        match go_on {
            Ok(true) => ControlFlow::Continue(()),
            Ok(false) => ControlFlow::Break(()),
            Err(error) => {
                raised = Some(error);
                ControlFlow::Break(())
            }
        }
    };
    let done = run_raw(py, || work(&mut report))?;
    match (done, raised) {
        (Err(VectorError::Cancelled), Some(error)) => Err(error),
        (done, _) => done.map_err(|error| error.into_py(py)),
    }
}
