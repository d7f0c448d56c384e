//! `icecache._core`: convert, check, release the GIL, call the core, map the error.
//!
//! No algorithm lives here. Every call that locks or works longer than a few microseconds runs in [`errors::run`],
//! which detaches from the interpreter and turns a panic of the core into a `RuntimeError`.

mod arrays;
mod engine;
mod errors;
mod forest;
mod memory;
mod mirror;
mod paper;
mod pool;
mod selection;
mod vector;
mod vectors;

use pyo3::prelude::*;

/// The compiled half of the Python package `icecache`.
#[pymodule(gil_used = false)]
mod _core {
    #[pymodule_export]
    use crate::engine::{Engine, Mailbox};
    #[pymodule_export]
    use crate::forest::{Ahead, Forest, PageStore, extend};
    #[pymodule_export]
    use crate::memory::{HostMemory, default_workers, spare_cores, topology};
    #[pymodule_export]
    use crate::mirror::Mirror;
    #[pymodule_export]
    use crate::paper::{PaperForest, paper_search};
    #[pymodule_export]
    use crate::pool::{Pool, simd};
    #[pymodule_export]
    use crate::selection::{Selection, all_pages, random_pages, search, select_pages};
    #[pymodule_export]
    use crate::vector::VectorIndex;
    #[pymodule_export]
    use crate::vectors::Filter;
}
