//! `icecache._core`: convert, check, release the GIL, call the core, map the error.

use pyo3::prelude::*;

/// The compiled half of the Python package `icecache`.
#[pymodule(gil_used = false)]
mod _core {}
