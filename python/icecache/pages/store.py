"""Page stores by shape, and the byte views through which tensors cross into the core."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from icecache import _core
from icecache.errors import UnsupportedModelError

Bytes = npt.NDArray[np.uint8]

_DTYPE_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def as_bytes(tensor: torch.Tensor) -> Bytes:
    """View a tensor as bytes, for one path through the core whatever the dtype (NumPy has no bfloat16).

    Parameters
    ----------
    tensor : torch.Tensor
        (..., dim), on the CPU, C-contiguous.

    Returns
    -------
    numpy.ndarray
        uint8, (..., dim * itemsize), sharing the tensor's memory.
    """
    assert tensor.is_contiguous(), "only a contiguous tensor has the byte layout that the core expects"
    return tensor.detach().view(torch.uint8).numpy()


def to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Copy to the CPU if need be; contiguous."""
    return tensor.detach().to("cpu").contiguous()  # sync: pages live on the host


class Stores:
    """The page stores of one runtime: one per (key dim, value dim, dtype).

    Parameters
    ----------
    limit_bytes : int or None
        Limit of each store.
    """

    def __init__(self, limit_bytes: int | None) -> None:
        self.limit_bytes = limit_bytes
        self._stores: dict[tuple[int, int, torch.dtype], _core.PageStore] = {}

    def get(self, key_dim: int, value_dim: int, dtype: torch.dtype) -> _core.PageStore:
        """Store for pages of this shape.

        Raises
        ------
        UnsupportedModelError
            If the dtype is none of float32, float16, bfloat16.
        """
        name = _DTYPE_NAMES.get(dtype)
        if name is None:
            msg = f"the KV cache must be float32, float16 or bfloat16, got {dtype}"
            raise UnsupportedModelError(msg)
        shape = (key_dim, value_dim, dtype)
        if shape not in self._stores:
            self._stores[shape] = _core.PageStore(key_dim, value_dim, name, limit_bytes=self.limit_bytes)
        return self._stores[shape]

    def owns(self, store: _core.PageStore) -> bool:
        """Whether `store` is one of these."""
        return any(store is own for own in self._stores.values())

    def used_bytes(self) -> int:
        """Bytes of all pages in use."""
        return sum(store.used_bytes() for store in self._stores.values())
