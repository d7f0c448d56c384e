//! NumPy arrays and numbers from Python, checked: dtype, shape, C order, alignment, writability; errors name the
//! argument.
//!
//! Memory is borrowed for the length of the call and never kept. rust-numpy's borrow checker refuses arrays of one call
//! (or of calls at the same time) that overlap where one of them is written; a caller who writes to an input from
//! another thread meanwhile gets a mixture of old and new values.

use icecache_core::Columns;
use numpy::{
    Element, PyArray1, PyArrayDescrMethods, PyArrayDyn, PyArrayMethods, PyReadonlyArrayDyn, PyReadwriteArrayDyn,
    PyUntypedArray, PyUntypedArrayMethods,
};
use pyo3::exceptions::{PyTypeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyInt;

/// An array of `T` in C order; `shape` gives the expected length per axis, `None` for any.
pub(crate) fn checked<'py, T: Element>(
    value: &Bound<'py, PyAny>,
    name: &str,
    shape: &[Option<usize>],
) -> PyResult<Bound<'py, PyArrayDyn<T>>> {
    let py = value.py();
    let expected = numpy::dtype::<T>(py);
    let Ok(untyped) = value.cast::<PyUntypedArray>() else {
        let got = value.get_type().name()?;
        return Err(PyTypeError::new_err(format!("{name}: expected a NumPy array of {expected}, got {got}")));
    };
    if !untyped.dtype().is_equiv_to(&expected) {
        let got = untyped.dtype();
        return Err(PyTypeError::new_err(format!("{name}: expected an array of {expected}, got {got}")));
    }
    let fits = |(length, want): (&usize, &Option<usize>)| want.is_none_or(|want| want == *length);
    if untyped.ndim() != shape.len() || !untyped.shape().iter().zip(shape).all(fits) {
        let axes: Vec<String> = shape.iter().map(|n| n.map_or_else(|| "any".into(), |n| n.to_string())).collect();
        let message = format!("{name}: expected shape ({}), got {:?}", axes.join(", "), untyped.shape());
        return Err(PyValueError::new_err(message));
    }
    // `as_slice` of rust-numpy accepts Fortran order and hands out the transposed elements.
    if !untyped.is_c_contiguous() {
        return Err(PyValueError::new_err(format!("{name}: expected a C-contiguous array, got another layout")));
    }
    let array = value.cast::<PyArrayDyn<T>>()?;
    if !array.data().is_aligned() {
        return Err(PyValueError::new_err(format!("{name}: expected aligned memory")));
    }
    Ok(array.clone())
}

/// Borrows a checked array for reading.
pub(crate) fn readonly<'py, T: Element>(
    value: &Bound<'py, PyAny>,
    name: &str,
    shape: &[Option<usize>],
) -> PyResult<PyReadonlyArrayDyn<'py, T>> {
    let array = checked::<T>(value, name, shape)?;
    array.try_readonly().map_err(|error| PyValueError::new_err(format!("{name}: {error}")))
}

/// Borrows a checked array for writing.
pub(crate) fn readwrite<'py, T: Element>(
    value: &Bound<'py, PyAny>,
    name: &str,
    shape: &[Option<usize>],
) -> PyResult<PyReadwriteArrayDyn<'py, T>> {
    let array = checked::<T>(value, name, shape)?;
    array.try_readwrite().map_err(|error| PyValueError::new_err(format!("{name}: {error}")))
}

/// The elements of a borrowed, checked array.
pub(crate) fn slice<'a, T: Element>(array: &'a PyReadonlyArrayDyn<'_, T>, name: &str) -> PyResult<&'a [T]> {
    array.as_slice().map_err(|error| PyValueError::new_err(format!("{name}: {error}")))
}

/// The elements of a borrowed, checked output array.
pub(crate) fn slice_mut<'a, T: Element>(
    array: &'a mut PyReadwriteArrayDyn<'_, T>,
    name: &str,
) -> PyResult<&'a mut [T]> {
    array.as_slice_mut().map_err(|error| PyValueError::new_err(format!("{name}: {error}")))
}

/// An output array of bytes, and which columns of stored rows are copied to it.
pub(crate) struct Target<'py> {
    array: PyReadwriteArrayDyn<'py, u8>,
    name: &'static str,
    columns: Columns,
}

impl<'py> Target<'py> {
    /// Borrows an array of `shape` and one more axis: `whole` columns, or from byte `at` on as many as it has.
    pub(crate) fn new(
        array: &Bound<'py, PyAny>,
        name: &'static str,
        shape: &[Option<usize>],
        at: Option<usize>,
        whole: Columns,
    ) -> PyResult<Self> {
        let width = if at.is_none() { Some(whole.len) } else { None };
        let shape: Vec<Option<usize>> = shape.iter().copied().chain([width]).collect();
        let array = readwrite::<u8>(array, name, &shape)?;
        let len = array.shape().last().copied().unwrap_or(0);
        Ok(Self { array, name, columns: Columns { start: at.unwrap_or(whole.start), len } })
    }

    /// The columns, and where they go.
    pub(crate) fn parts(&mut self) -> PyResult<(Columns, &mut [u8])> {
        Ok((self.columns, slice_mut(&mut self.array, self.name)?))
    }
}

/// A new array of the given shape; the elements are moved, not copied.
pub(crate) fn to_array<'py, T: Element>(
    py: Python<'py>,
    values: Vec<T>,
    shape: &[usize],
) -> PyResult<Bound<'py, PyArrayDyn<T>>> {
    PyArray1::from_vec(py, values).reshape(shape.to_vec())
}

/// A count or size: an `int` of at least 0.
pub(crate) fn count(value: &Bound<'_, PyAny>, name: &str) -> PyResult<usize> {
    let wrong = || PyTypeError::new_err(format!("{name}: expected an int, got {:?}", value.get_type()));
    let number = value.call_method0("__index__").map_err(|_| wrong())?;
    let number = number.cast::<PyInt>().map_err(|_| wrong())?;
    number
        .extract::<isize>()
        .ok()
        .and_then(|n| usize::try_from(n).ok())
        .ok_or_else(|| PyValueError::new_err(format!("{name}: expected an int in [0, 2**63), got {number}")))
}

/// [`count`], or nothing for `None`.
pub(crate) fn optional_count(value: Option<&Bound<'_, PyAny>>, name: &str) -> PyResult<Option<usize>> {
    value.map(|value| count(value, name)).transpose()
}
