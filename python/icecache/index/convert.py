"""From what users hold (NumPy, torch, lists) to what the compiled core takes, with readable errors on the way."""

from __future__ import annotations

from typing import Protocol, TypeGuard

import numpy as np
import numpy.typing as npt

#: Exclusive upper bound of an id; -1 marks "no neighbour" in results.
MAX_ID = 2**63


class _Device(Protocol):
    @property
    def type(self) -> str: ...


class _Tensor(Protocol):
    """The part of `torch.Tensor` used here, so that torch itself is never imported."""

    @property
    def device(self) -> _Device: ...

    def detach(self) -> _Tensor: ...

    def float(self) -> _Tensor: ...

    def numpy(self) -> npt.NDArray[np.generic]: ...


def _is_tensor(values: object) -> TypeGuard[_Tensor]:
    # By name, because `isinstance` on a protocol costs ten times a search's other overhead.
    return hasattr(values, "detach")


def as_matrix(values: npt.ArrayLike, name: str, dim: int) -> tuple[npt.NDArray[np.float32], bool]:
    """Give `values` as a C-contiguous float32 matrix.

    Parameters
    ----------
    values : array_like, (n, dim) or (dim,)
        float32, float16, float64, bfloat16 (torch or ml_dtypes) or integers; strided, read-only and mapped arrays and
        CPU tensors too. C-contiguous float32 is not copied.
    name : str
        What to call the argument in an error.
    dim : int
        Expected length of a row.

    Returns
    -------
    matrix : float32 array, (n, dim)
    single : bool
        Whether `values` was one vector.

    Raises
    ------
    TypeError
        If `values` is not numeric or lies on another device than the CPU.
    ValueError
        If the shape is wrong.
    """
    array = _as_array(values, name)
    if array.ndim not in (1, 2) or array.shape[-1] != dim:
        if array.ndim == 1 and array.size == 0:  # an empty list has lost its second axis
            return np.empty((0, dim), np.float32), False
        msg = f"{name}: expected shape ({dim},) or (n, {dim}), got {array.shape}"
        raise ValueError(msg)
    if array.dtype == np.float64:
        with np.errstate(over="ignore"):  # what overflows float32 becomes inf and is refused with its row
            array = array.astype(np.float32)
    matrix = np.ascontiguousarray(array, dtype=np.float32).reshape(-1, dim)
    return matrix, array.ndim == 1


def _as_array(values: npt.ArrayLike, name: str) -> npt.NDArray[np.generic]:
    if _is_tensor(values):
        if values.device.type != "cpu":
            msg = f"{name}: expected a CPU tensor, got one on {values.device}; use .cpu()"
            raise TypeError(msg)
        tensor = values.detach()
        if str(getattr(tensor, "dtype", "")) == "torch.bfloat16":
            tensor = tensor.float()  # NumPy has no bfloat16; widening is exact
        return tensor.numpy()
    try:
        array = np.asarray(values)
    except ValueError as error:
        msg = f"{name}: expected a rectangular array of numbers ({error})"
        raise ValueError(msg) from error
    if array.dtype.kind not in "fiu" and array.dtype.name != "bfloat16":
        msg = f"{name}: expected numbers (float32, float16, bfloat16, float64 or integers), got dtype {array.dtype}"
        raise TypeError(msg)
    return array


def as_ids(values: npt.ArrayLike, name: str = "ids") -> npt.NDArray[np.int64]:
    """Give `values` as a one-dimensional C-contiguous int64 array of ids in [0, 2**63).

    Raises
    ------
    TypeError
        If the values are not integers.
    ValueError
        If an id is out of range or there is more than one axis.
    """
    try:
        array = np.asarray(values.detach().numpy() if _is_tensor(values) else values)
    except (ValueError, OverflowError) as error:
        msg = f"{name}: expected integers in [0, 2**63) ({error})"
        raise ValueError(msg) from error
    if array.size == 0:
        return np.empty(0, np.int64)
    if array.ndim > 1:
        msg = f"{name}: expected one axis, got shape {array.shape}"
        raise ValueError(msg)
    if array.dtype.kind == "O" and all(isinstance(value, int) for value in array.ravel()):
        bad = next(value for value in array.ravel() if not 0 <= value < MAX_ID)
        msg = f"{name}: expected ids in [0, 2**63), got {bad}"
        raise ValueError(msg)
    if array.dtype.kind not in "iu":
        msg = f"{name}: expected integers, got dtype {array.dtype}"
        raise TypeError(msg)
    flat = array.reshape(-1)
    outside = (flat < 0) if flat.dtype.kind == "i" else (flat >= np.uint64(MAX_ID))
    if outside.any():
        row = int(np.argmax(outside))
        msg = f"{name}: expected ids in [0, 2**63), got {flat[row]} at row {row}"
        raise ValueError(msg)
    return np.ascontiguousarray(flat, dtype=np.int64)
