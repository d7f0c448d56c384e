"""Gather selected pages into reusable host memory and copy them to the device.

Dimension key: R rows, H KV heads, K pages, T = 16 K slots, D head dim.
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from icecache import _core
from icecache.config import PAGE_TOKENS
from icecache.pages import as_bytes, columns
from icecache.stats import Recorder


@dataclass(frozen=True, slots=True)
class Fetched:
    """Tokens on the compute device, ready for attention.

    Parameters
    ----------
    keys, values : torch.Tensor
        (R, H, T, D). On a CPU they live in staging memory: valid until the next fetch of the same thread.
    mask : torch.Tensor or None
        Bool (R, H, T): live slots; None: all are.
    n_tokens : numpy.ndarray
        int64 (R, H): live slots per head.
    n_pages : int
        Pages behind them, over rows and heads.
    """

    keys: torch.Tensor
    values: torch.Tensor
    mask: torch.Tensor | None
    n_tokens: npt.NDArray[np.int64]
    n_pages: int


class Staging:
    """Host memory that pages are gathered into, kept per thread and grown on demand; pinned for CUDA devices."""

    def __init__(self) -> None:
        self._local = threading.local()

    def _buffer(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, pinned: bool) -> torch.Tensor:
        n_bytes = math.prod(shape) * dtype.itemsize
        held: dict[tuple[str, bool], torch.Tensor] = self._local.__dict__.setdefault("held", {})
        buffer = held.get((name, pinned))
        if buffer is None or buffer.numel() < n_bytes:
            buffer = held[name, pinned] = torch.empty(max(n_bytes, 1 << 16), dtype=torch.uint8, pin_memory=pinned)
        return buffer[:n_bytes].view(dtype).view(shape)

    def fetch(
        self,
        pool: _core.Pool,
        recorder: Recorder,
        selection: _core.Selection,
        key_dim: int,
        value_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        place: int = 0,
    ) -> Fetched:
        """Copy all pages of a selection to `device`. Blocks until the copies are done.

        Parameters
        ----------
        selection : Selection
            Pages (R, H, K).
        place : int
            Whose keys and values of the layers that share the pages; 0 is the leader.
        """
        counts = np.asarray(selection.counts)  # a copy at each access
        shape = (*counts.shape, PAGE_TOKENS)
        pinned = device.type == "cuda"
        with recorder.part("transfer"):
            keys = self._buffer("keys", (*shape, key_dim), dtype, pinned)
            values = self._buffer("values", (*shape, value_dim), dtype, pinned)
            raw_keys, raw_values = as_bytes(keys), as_bytes(values)
            at = columns(place, raw_keys.shape[-1], raw_values.shape[-1])
            recorder.bytes_to_device += selection.gather(pool, 0, counts.shape[2], raw_keys, raw_values, *at)
            keys, values = keys.flatten(2, 3).to(device), values.flatten(2, 3).to(device)
            n_pages = int(np.count_nonzero(counts))
            recorder.pages_read += n_pages
            mask = slot_mask(counts, device)
        return Fetched(keys, values, mask, counts.sum(-1, dtype=np.int64), n_pages)


def slot_mask(counts: npt.NDArray[np.int32], device: torch.device) -> torch.Tensor | None:
    """Live slots (R, H, 16 K) from live counts (R, H, K); None when every page is full."""
    if bool((counts == PAGE_TOKENS).all()):
        return None
    live = np.arange(PAGE_TOKENS) < counts[..., None]
    return torch.from_numpy(live.reshape(*counts.shape[:2], -1)).to(device)
