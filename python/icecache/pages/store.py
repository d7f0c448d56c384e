"""Page stores by shape, and the byte views through which tensors cross into the core."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress

import numpy as np
import numpy.typing as npt
import torch

from icecache import _core
from icecache.errors import PoolExhaustedError, UnsupportedModelError
from icecache.pages.host import host_memory, warn_if_pageable

Bytes = npt.NDArray[np.uint8]

_CPU = torch.device("cpu")
_PIECE_BYTES = 128 << 20
"""Page-locked between two looks at what is in use: 30 ms."""
_DTYPE_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


def dtype_name(dtype: torch.dtype) -> str:
    """Name of an element type as the core spells it.

    Raises
    ------
    UnsupportedModelError
        If it is none of float32, float16, bfloat16.
    """
    name = _DTYPE_NAMES.get(dtype)
    if name is None:
        msg = f"the KV cache must be float32, float16 or bfloat16, got {dtype}"
        raise UnsupportedModelError(msg)
    return name


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


def to_host_together(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copy many small tensors to the CPU, contiguous, in one transfer for all of one shape, dtype and device."""
    result = list(tensors)
    for indices in _alike(tensors):
        stacked = torch.stack([tensors[i].detach() for i in indices]).to("cpu")  # sync: pages live on the host
        for i, copy in zip(indices, stacked.unbind(), strict=True):
            result[i] = copy
    return result


def start_to_host(tensors: Sequence[torch.Tensor]) -> tuple[list[torch.Tensor], torch.cuda.Event | None]:
    """Start what `to_host_together` does on the current stream, through page-locked memory.

    Returns
    -------
    list of torch.Tensor, event or None
        The copies, complete once the event has happened; None: they are.
    """
    result, ready = list(tensors), None
    for indices in _alike(tensors):
        host = torch.stack([tensors[i].detach() for i in indices])
        if host.is_cuda:
            host = torch.empty(host.shape, dtype=host.dtype, pin_memory=True).copy_(host, non_blocking=True)
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        for i, copy in zip(indices, host.unbind(), strict=True):
            result[i] = copy
    if ready is not None:
        ready.record()
    return result, ready


def _alike(tensors: Sequence[torch.Tensor]) -> Iterable[list[int]]:
    """Group the indices of tensors of one shape, dtype and device."""
    groups: dict[object, list[int]] = {}
    for i, tensor in enumerate(tensors):
        groups.setdefault((tensor.shape, tensor.dtype, tensor.device), []).append(i)
    return groups.values()


class Stores:
    """The page stores of one runtime: one per (key dim, value dim, dtype, kind of device).

    Parameters
    ----------
    limit_bytes : int or None
        Limit of each store, for its pages and what is lent.
    pool : Pool or None
        Its threads commit page-locked memory; None: memory is never page-locked.
    memory : HostMemory or None
        Where memory comes from, whatever the device; None: page-locked memory for a GPU, the ordinary one otherwise.
    serve : callable or None
        Called with each new store whose pages a GPU reads.
    value_means : bool, default=False
        Whether stores keep the mean value of each page, for estimates of what is not read.
    """

    def __init__(
        self,
        limit_bytes: int | None,
        pool: _core.Pool | None = None,
        memory: _core.HostMemory | None = None,
        serve: Callable[[_core.PageStore], None] | None = None,
        *,
        value_means: bool = False,
    ) -> None:
        self.limit_bytes, self.pool, self.memory, self.serve = limit_bytes, pool, memory, serve
        self.value_means = value_means
        self._fixed = memory is not None
        self._shared: list[_core.HostMemory] = []
        """Memory of pages that were made by other runtimes and are read here."""
        self._stores: dict[tuple[int, int, torch.dtype, str], _core.PageStore] = {}
        self._reserver: ThreadPoolExecutor | None = None
        self._reserving: list[Future[None]] = []

    def get(self, key_dim: int, value_dim: int, dtype: torch.dtype, device: torch.device = _CPU) -> _core.PageStore:
        """Store for pages of this shape, which `device` can read in place if their memory can be page-locked.

        Raises
        ------
        UnsupportedModelError
            If the dtype is none of float32, float16, bfloat16.
        """
        name = dtype_name(dtype)
        shape = (key_dim, value_dim, dtype, device.type)
        if shape not in self._stores:
            memory = self._memory_for(device)
            store = _core.PageStore(
                key_dim,
                value_dim,
                name,
                limit_bytes=self.limit_bytes,
                memory=memory,
                value_means=self.value_means and value_dim > 0,
            )
            if self.serve is not None and device.type != "cpu":
                self.serve(store)
            self._stores[shape] = store
        return self._stores[shape]

    def _memory_for(self, device: torch.device) -> _core.HostMemory | None:
        if self._fixed:
            return self.memory
        if device.type == "cpu" or self.pool is None:
            return None
        if self.memory is None:
            self.memory = host_memory(self.pool, device)
        return self.memory

    def lend(self, n_bytes: int) -> Bytes:
        """Zeroed memory of the same kind as that of pages, counted towards their limit until the array goes.

        Raises
        ------
        MemoryError
            If limit or machine leave no room; nothing has changed then.
        """
        assert self.memory is not None, "pages that a device reads have memory"
        with ExitStack() as charged:
            for store in self._stores.values():
                store.charge(n_bytes)
                charged.callback(store.discharge, n_bytes)
            lent = self.memory.lend(n_bytes)
            weakref.finalize(lent, charged.pop_all().close)
        return lent

    def share(self, other: Stores) -> None:
        """Take over sequences whose pages lie in memory of `other`, from where more of them will come too."""
        if other.memory is None:
            return
        if self.memory is None:
            self.memory = other.memory
        elif other.memory is not self.memory and other.memory not in self._shared:
            self._shared.append(other.memory)

    def is_pinned(self) -> bool:
        """Whether a device can read all pages in place."""
        return self.memory is not None and all(memory.is_pinned() for memory in (self.memory, *self._shared))

    def reserve(self, n_bytes: int) -> None:
        """Take memory ahead for `n_bytes` more of pages per store; page-locking it within a step would delay it.

        Raises
        ------
        PoolExhaustedError
            If there is none; what was reserved before stays.
        """
        try:
            for store in self._stores.values():
                store.reserve(n_bytes)
        except MemoryError as error:
            raise PoolExhaustedError(str(error), needed_bytes=n_bytes) from error
        if self.memory is not None and not self._fixed:
            warn_if_pageable(self.memory)

    def start_reserving(self, store: _core.PageStore, n_bytes: int) -> None:
        """Begin to take memory for `n_bytes` more of pages in `store`, if it has to be page-locked.

        What a prompt needs is locked while the device computes its first layers; done layer by layer, when pages are
        written, it adds 1 s to the first prompt of 36,864 tokens of an 8B model. Whether there is enough is for those
        to say who write the pages.
        """
        if self.memory is None:
            return
        if self._reserver is None:
            self._reserver = ThreadPoolExecutor(max_workers=1, thread_name_prefix="icecache-reserve")
        self._reserving.append(self._reserver.submit(_reserve, store, n_bytes))

    def settle(self) -> None:
        """Wait until what was begun is reserved: registering memory beside a decode step would delay it."""
        while self._reserving:
            self._reserving.pop().result()

    def close(self) -> None:
        """End the thread that reserves; the stores stay usable."""
        self.settle()
        if self._reserver is not None:
            self._reserver.shutdown()
            self._reserver = None

    def owns(self, store: _core.PageStore) -> bool:
        """Whether `store` is one of these."""
        return any(store is own for own in self._stores.values())

    def used_bytes(self) -> int:
        """Bytes of all pages in use."""
        return sum(store.used_bytes() for store in self._stores.values())


def _reserve(store: _core.PageStore, n_bytes: int) -> None:
    """Reserve piece by piece, because what is in use at first may be a dropped sequence that is about to be freed."""
    reached, lowest = 0, store.used_bytes()
    with suppress(MemoryError):
        while True:
            used = store.used_bytes()
            lowest = min(lowest, used)
            if reached >= lowest + n_bytes:
                return
            reached = min(max(reached, used) + _PIECE_BYTES, lowest + n_bytes)
            store.reserve(max(reached - used, 0))
