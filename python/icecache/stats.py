"""What a runtime did, counted. Plain Python numbers; nothing here touches a device."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

PARTS = ("prefill_offload", "index_build", "insert_wait", "summaries", "search", "transfer", "attention")


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeStats:
    """Counters since ``wrap`` or the last ``reset_stats``.

    Parameters
    ----------
    steps : int
        Forwards that began with paged layers (decode steps and later chunks; all layers together count once).
    attended_mean : float
        Tokens attended per query head, layer that is not dense, row and decode step: sink, window, waiting tokens,
        retrieved ones, newest token. Under "full" all layers count.
    attended_min, attended_max : int
        The extremes of the same.
    loaded_mean : float
        Tokens read per KV head: the union over its query group. Equal to `attended_mean` where the group shares one
        choice, up to the size of the group times as many where each query head has its own.
    generated_mean : float
        Tokens among the attended ones that came after the dense prefill; NaN where that is not known (pages).
    generated_kept : str
        What becomes of tokens that come after the dense prefill. "all": attended for ever, on top of the budget.
        "indexed": chosen like those of the prompt. "window": forgotten once they leave the window. "scored": they
        compete for a place and are forgotten when they lose it.
    dense_layers : tuple of int
        Layers that attend to everything and are not counted above: those of the config and those of the method itself.
    parameters : dict of str to float
        What the policy settled by itself, mean over layers and prompts: tables and bits of "magicpig", say.
    pages_read : int
        Pages fetched, over all heads, layers, rows and steps (exact later chunks included).
    bytes_to_device : int
        Bytes of keys and values copied from the page store for attention.
    bytes_to_host : int
        Bytes of keys and values that left the compute device for the page store.
    summary_bytes : int
        Summaries of pages that graph steps search, on the device and not in `device_bytes`. They are kept for the next
        sequence until `unwrap`, and so are their second bits in host memory, some 3 % of the pages (`search_bits`).
    device_bytes, host_bytes, index_bytes : int
        Bytes held now by the live caches on the compute device, in the page stores they use, and in the index beside
        the pages. Pages shared by forks count once; `index_bytes` counts what forks share once per fork. A cache
        adopted from another runtime uses that runtime's page store.
    ms : dict of str to float
        Wall time by part, in milliseconds: prefill_offload, index_build, insert_wait, summaries (the host's part),
        search (on the host only), transfer, attention. On a CUDA device prompts and inserts are built in the
        background, and insert_wait is how long steps waited for inserts; work is queued, so attention shows the time to
        enqueue it.
    mass_kept : float
        Mean estimated share of the softmax that the attended tokens hold, over heads, layers and decode steps; NaN
        before the first decode step and for policies that score nothing ("random", "streaming"). Exact for
        policies that mask. Of layers that share pages (`reuse`), those that search count, and rows that are read whole.
    """

    steps: int
    attended_mean: float
    attended_min: int
    attended_max: int
    loaded_mean: float
    generated_mean: float
    generated_kept: str
    dense_layers: tuple[int, ...]
    parameters: dict[str, float]
    pages_read: int
    bytes_to_device: int
    bytes_to_host: int
    summary_bytes: int
    device_bytes: int
    host_bytes: int
    index_bytes: int
    ms: dict[str, float]
    mass_kept: float


@dataclass(frozen=True, slots=True)
class TraceEvent:
    """What one layer read in one decode step.

    Parameters
    ----------
    layer : int
        Layer of the model.
    rows : tuple of int
        Rows of the batch this event is about.
    lengths : tuple of int
        Tokens of each of these rows, the newest one included.
    sink_tokens, window_start : tuple of int
        Per row: positions ``0 .. sink_tokens - 1`` and ``window_start .. length - 1`` were read on the device.
    pages : numpy.ndarray
        int64, (rows, n_kv_heads, pages): ids read, -1 where there is none.
    positions : numpy.ndarray
        int32, (rows, n_kv_heads, pages, 16): position in the row of each retrieved token, -1 where there is none.
    attended : numpy.ndarray or None
        Of a policy that masks: bool, (rows, n_kv_heads, group, positions), everything that was attended; `sink_tokens`
        is 0, `window_start` the length, and there are no pages then. None: sink, window and `positions` say it.
    """

    layer: int
    rows: tuple[int, ...]
    lengths: tuple[int, ...]
    sink_tokens: tuple[int, ...]
    window_start: tuple[int, ...]
    pages: np.ndarray
    positions: np.ndarray
    attended: np.ndarray | None = None


Trace = Callable[[TraceEvent], None]


@dataclass(slots=True)
class Recorder:
    """Mutable counters behind :class:`RuntimeStats`, one per runtime."""

    steps: int = 0
    attended_sum: int = 0
    attended_n: int = 0
    attended_min: int = 0
    attended_max: int = 0
    pages_read: int = 0
    bytes_to_device: int = 0
    bytes_to_host: int = 0
    mass_n: int = 0
    ms: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the wall time of the block to part `name`."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.ms[name] += (time.perf_counter() - start) * 1e3

    def attended(self, tokens: np.ndarray) -> None:
        """Count one decode step of one layer; `tokens` is an integer array with one entry per (row, KV head)."""
        low, high = int(tokens.min()), int(tokens.max())
        self.attended_min = low if self.attended_n == 0 else min(self.attended_min, low)
        self.attended_max = max(self.attended_max, high)
        self.attended_sum += int(tokens.sum())
        self.attended_n += tokens.size
