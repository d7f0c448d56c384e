"""From what users hold (NumPy, torch, lists) to what the compiled core takes, with readable errors on the way."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Protocol, TypeGuard, cast

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from typing_extensions import CapsuleType

#: Exclusive upper bound of an id; -1 marks "no neighbour" in results.
MAX_ID = 2**63
#: Stands for bfloat16 inside this module: 2 bytes that NumPy does no arithmetic with.
_BFLOAT16 = np.dtype([("bfloat16", np.uint16)])
#: Number of the CPU in DLPack.
_DLPACK_CPU = 1


#: Element types that the core reads as they are; bfloat16 crosses as its uint16 bits.
_NATIVE = ("float32", "float64", "float16", "bfloat16")


class _Device(Protocol):
    @property
    def type(self) -> str: ...


class _Tensor(Protocol):
    """The part of `torch.Tensor` used here, so that torch itself is never imported."""

    @property
    def device(self) -> _Device: ...

    @property
    def dtype(self) -> object: ...

    def detach(self) -> _Tensor: ...

    def view(self, dtype: object) -> _Tensor: ...

    def numpy(self) -> npt.NDArray[np.generic]: ...


def _is_tensor(values: object) -> TypeGuard[_Tensor]:
    # By name, because `isinstance` on a protocol costs ten times a search's other overhead.
    return hasattr(values, "detach")


class _Exporter(Protocol):
    """An array of another library that speaks DLPack."""

    def __dlpack_device__(self) -> tuple[int, int]: ...

    def __dlpack__(self, *, stream: None = None) -> CapsuleType: ...


def _as_exporter(values: object) -> _Exporter | None:
    foreign = not isinstance(values, np.ndarray) and hasattr(values, "__dlpack_device__")
    return cast("_Exporter", values) if foreign else None


def from_tensor(values: npt.ArrayLike, name: str) -> npt.ArrayLike:
    """Give a CPU tensor as the array that shares its memory, and everything else as it is.

    Raises
    ------
    TypeError
        If the values lie on another device than the CPU: nothing is copied from there silently.
    """
    if _is_tensor(values):
        if values.device.type != "cpu":
            msg = f"{name}: expected a CPU tensor, got one on {values.device}; use .cpu()"
            raise TypeError(msg)
        tensor = values.detach()
        if str(tensor.dtype) == "torch.bfloat16":  # NumPy has no bfloat16: the same bits, with a name that says so
            bits = tensor.view(sys.modules["torch"].int16).numpy()
            return bits.view(_BFLOAT16)
        return tensor.numpy()
    exporter = _as_exporter(values)
    if exporter is None:
        return values
    if exporter.__dlpack_device__()[0] != _DLPACK_CPU:
        msg = f"{name}: expected an array in CPU memory, got one on another device; copy it to the CPU first"
        raise TypeError(msg)
    try:
        return np.from_dlpack(exporter)
    except (BufferError, RuntimeError, TypeError):  # a type that NumPy lacks; the object may convert itself
        return values


def as_matrix(values: npt.ArrayLike, name: str, dim: int) -> tuple[npt.NDArray[np.float32], bool]:
    """Give `values` as a C-contiguous float32 matrix; see `as_rows`.

    Returns
    -------
    matrix : float32 array, (n, dim)
    single : bool
        Whether `values` was one vector.
    """
    array, single = as_rows(values, name, dim)
    if array.dtype == np.uint16:
        # The bits of bfloat16 are the upper half of those of float32.
        return (array.astype(np.uint32) << np.uint32(16)).view(np.float32), single
    with np.errstate(over="ignore"):  # what overflows float32 becomes inf and is refused with its row
        return np.ascontiguousarray(array, dtype=np.float32), single


def as_rows(values: npt.ArrayLike, name: str, dim: int) -> tuple[npt.NDArray[np.generic], bool]:
    """Give `values` as a C-contiguous matrix of a type that the core reads.

    Parameters
    ----------
    values : array_like, (n, dim) or (dim,)
        float32, float16, float64, bfloat16 (torch, ml_dtypes or DLPack) or integers; strided, read-only and mapped
        arrays and CPU tensors too. C-contiguous floats are not copied.
    name : str
        What to call the argument in an error.
    dim : int
        Expected length of a row.

    Returns
    -------
    rows : array, (n, dim), of float32, float64, float16 or, for bfloat16, uint16
    single : bool
        Whether `values` was one vector.

    Raises
    ------
    TypeError
        If `values` is not numeric or lies on another device than the CPU.
    ValueError
        If the shape is wrong or an element is masked.
    """
    if isinstance(values, np.ma.MaskedArray) and np.ma.is_masked(values):
        msg = f"{name}: expected numbers everywhere, got a masked array; fill it or drop the rows first"
        raise ValueError(msg)
    try:
        array = np.asarray(from_tensor(values, name))
    except ValueError as error:
        msg = f"{name}: expected a rectangular array of numbers ({error})"
        raise ValueError(msg) from error
    if array.ndim not in (1, 2) or array.shape[-1] != dim:
        if array.ndim == 1 and array.size == 0:  # an empty list has lost its second axis
            return np.empty((0, dim), np.float32), False
        msg = f"{name}: expected shape ({dim},) or (n, {dim}), got {array.shape}"
        raise ValueError(msg)
    single = array.ndim == 1
    if array.dtype == _BFLOAT16 or array.dtype.name == "bfloat16":
        bits = np.ascontiguousarray(array).view(np.uint16)
        return bits.reshape(-1, dim), single
    if array.dtype.kind not in "fiu":
        msg = f"{name}: expected numbers (float32, float16, bfloat16, float64 or integers), got dtype {array.dtype}"
        raise TypeError(msg)
    native = array.dtype if array.dtype.isnative and array.dtype.name in _NATIVE else np.dtype(np.float32)
    with np.errstate(over="ignore"):
        rows = np.ascontiguousarray(array, dtype=native).reshape(-1, dim)
    return (rows if rows.flags.aligned else rows.copy()), single


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
        array = np.asarray(from_tensor(values, name))
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
