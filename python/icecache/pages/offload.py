"""Take prompts off a GPU in the background: copies and packing of one layer run while the GPU computes the next ones.

One thread, one job a layer (or group of layers that share pages), in order. At most `DEPTH` layers, or one group, wait:
whoever brings another one waits too, so that the keys and values of a few layers, and not of all, are on the device.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from icecache import _core
from icecache.pages.move import Move, check_followers, insert
from icecache.pages.shelf import Pair, joined, row_dim
from icecache.pages.store import to_host
from icecache.stats import Recorder

DEPTH = 3


@dataclass(frozen=True, slots=True)
class Departure:
    """Tokens of one row on the device, and where they go."""

    layers: tuple[int, ...]
    """The layers that share the forest, the leader first."""
    row: int
    forest: _core.Forest
    pairs: tuple[Pair, ...]
    """Views ``[H, n, D]`` of keys and values of each layer."""


class Offload:
    """The background thread of one runtime; it starts with its first job.

    Parameters
    ----------
    pool : Pool
        Whose threads pack.
    layers : int
        Layers of a job: those that share pages leave together.
    """

    def __init__(self, pool: _core.Pool, layers: int = 1) -> None:
        self._pool = pool
        self._slots = threading.Semaphore(max(1, DEPTH // layers))
        self._thread: ThreadPoolExecutor | None = None
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def submit(self, recorder: Recorder, departures: Sequence[Departure]) -> Future[None]:
        """Queue what was enqueued on the current stream so far; waits while too many layers are under way.

        The tensors are kept until they are copied. The result raises what :func:`insert` raises.
        """
        self._slots.acquire()
        if self._thread is None:
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="icecache-offload")
        ready = None
        if departures[0].pairs[0][0].is_cuda:
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
            ready.record()
        return self._thread.submit(self._run, recorder, list(departures), ready)

    def close(self) -> None:
        """End the thread once its jobs are done."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)
            self._thread = None

    def _run(self, recorder: Recorder, departures: list[Departure], ready: torch.cuda.Event | None) -> None:
        try:
            with recorder.part("prefill_offload"):
                moves = self._copied(departures, ready)
            departures.clear()  # the device's memory is free from here on
            insert(self._pool, recorder, moves)
        finally:
            self._slots.release()

    def _copied(self, departures: Sequence[Departure], ready: torch.cuda.Event | None) -> list[Move]:
        if ready is None:  # on the host already
            return [_move(d, to_host) for d in departures]
        device = departures[0].pairs[0][0].device
        with torch.inference_mode(), torch.cuda.device(device):
            stream = self._streams.get(device)
            if stream is None:
                stream = self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            with torch.cuda.stream(stream):
                stream.wait_event(ready)
                moves = [_move(d, _staged) for d in departures]
            stream.synchronize()  # sync: this thread only
        return moves


def _move(departure: Departure, copy: Callable[[torch.Tensor], torch.Tensor]) -> Move:
    check_followers(departure.layers, departure.row, departure.pairs)
    keys, values = departure.pairs[0]
    rows = copy(values) if len(departure.pairs) == 1 else _staged_rows(departure.pairs)
    return Move(departure.layers[0], departure.row, departure.forest, copy(keys), rows)


def _staged_rows(pairs: Sequence[Pair]) -> torch.Tensor:
    """Copy of the joined rows ``[H, n, row_dim]``, made head by head: the device has room for one of them."""
    keys, values = pairs[0]
    width = row_dim(keys.shape[-1], values.shape[-1], len(pairs))
    host = torch.empty(*keys.shape[:2], width, dtype=keys.dtype, pin_memory=keys.is_cuda)
    for h in range(len(host)):
        host[h].copy_(joined([(k[h].detach(), v[h].detach()) for k, v in pairs])[1], non_blocking=True)
    return host


def _staged(tensor: torch.Tensor) -> torch.Tensor:
    """Copy to page-locked memory on the current stream; torch keeps such memory for the next time."""
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor.detach(), non_blocking=True)


def wait(job: Future[None] | None, *, check: bool) -> None:
    """Wait for a job; with `check`, raise what it raised."""
    if job is None:
        return
    error = job.exception()
    if check and error is not None:
        raise error
