//! Errors of the core as Python exceptions, in one place.

use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};

use icecache_core::Error;
use icecache_core::vector::VectorError;
use pyo3::exceptions::{PyKeyError, PyMemoryError, PyOSError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;

/// An error that has a Python exception.
pub(crate) trait IntoPy {
    fn into_py(self, py: Python<'_>) -> PyErr;
}

impl IntoPy for Error {
    fn into_py(self, _py: Python<'_>) -> PyErr {
        let message = self.to_string();
        match self {
            Self::MemoryLimit { .. } | Self::OutOfMemory { .. } | Self::HostMemory { .. } => {
                PyMemoryError::new_err(message)
            }
            Self::Invariant(_) => PyRuntimeError::new_err(message),
            // Everything else is an argument that does not fit.
            _ => PyValueError::new_err(message),
        }
    }
}

impl IntoPy for icecache_engine::Error {
    fn into_py(self, py: Python<'_>) -> PyErr {
        match self {
            Self::Core(error) => error.into_py(py),
            Self::Argument { .. } => PyValueError::new_err(self.to_string()),
            Self::Query { .. } => error_of_package(py, "BadTensorError", self.to_string()),
            _ => error_of_package(py, "EngineError", self.to_string()),
        }
    }
}

impl IntoPy for VectorError {
    fn into_py(self, py: Python<'_>) -> PyErr {
        match self {
            Self::Core(error) => error.into_py(py),
            Self::Memory { .. } => PyMemoryError::new_err(self.to_string()),
            Self::Missing(_) => PyKeyError::new_err(self.to_string()),
            Self::Format(_) => error_of_package(py, "IndexFormatError", self.to_string()),
            Self::Cancelled => error_of_package(py, "CancelledError", self.to_string()),
            Self::ReadOnly => error_of_package(py, "ReadOnlyIndexError", self.to_string()),
            Self::Io(error) => os_error(error),
            Self::Reentrant | Self::Forked => PyRuntimeError::new_err(self.to_string()),
            _ => PyValueError::new_err(self.to_string()),
        }
    }
}

/// The `OSError` that Python itself would raise, so that `error.errno == errno.ENOSPC` can be asked.
fn os_error(error: io::Error) -> PyErr {
    let Some(code) = error.raw_os_error() else { return error.into() };
    let text = error.to_string();
    let text = text.split(" (os error").next().unwrap_or(&text).to_owned();
    // The number once more at the end is what Windows goes by.
    PyOSError::new_err((code, text, None::<String>, code))
}

/// An exception of `icecache.errors`.
fn error_of_package(py: Python<'_>, name: &str, message: String) -> PyErr {
    let class = py.import("icecache.errors").and_then(|module| module.getattr(name));
    match class.and_then(|class| class.call1((message,))) {
        Ok(error) => PyErr::from_value(error),
        Err(error) => error,
    }
}

/// Runs `work` without the GIL; a panic becomes a `RuntimeError`.
///
/// The core publishes complete states only, so a panic half-way leaves what was published before.
pub(crate) fn run<T: Send, E: IntoPy + Send>(
    py: Python<'_>,
    work: impl FnOnce() -> Result<T, E> + Send,
) -> PyResult<T> {
    run_raw(py, work)?.map_err(|error| error.into_py(py))
}

/// [`run`] that leaves the core's error as it is.
pub(crate) fn run_raw<T: Send>(py: Python<'_>, work: impl FnOnce() -> T + Send) -> PyResult<T> {
    py.detach(|| catch_unwind(AssertUnwindSafe(work))).map_err(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        let text = text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("no message");
        PyRuntimeError::new_err(format!("bug in IceCache, please report it: {text}"))
    })
}
