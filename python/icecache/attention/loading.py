"""Kernels of decode steps, compiled while a prompt is still being computed.

Triton compiles a kernel at its first launch, .1 s each, and a step launches eight: the second token of a process would
wait for them. So a step is launched once beside the prompt, in a thread and on a stream of its own, over buffers that
hold no token. What Triton compiles depends on types, dimensions and whether sizes are multiples of 16, so sizes are
those of the step to come.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace

import numpy as np
import torch

from icecache.attention.device import DeviceStep, StepShape, shared_sizes
from icecache.attention.finder import FinderShape, PageFinder


def load_step(shape: StepShape, finder: FinderShape | None, softcap: float | None) -> None:
    """Launch what a step of this shape launches, over nothing.

    Layers without pages are left out. Of groups of layers that share pages two of each size are launched: what the
    second reads of a buffer for all starts at another alignment.

    Parameters
    ----------
    finder : FinderShape or None
        None: pages are chosen elsewhere.
    """
    sizes = tuple(sorted(2 * list(set(shape.group_sizes))))
    shape = replace(shape, n_layers=sum(sizes), shared=shared_sizes(sizes), numbers=(), static=())
    step = DeviceStep(shape, None)
    if finder is not None:
        step.finder = PageFinder(shape, finder)
        if finder.bits == 1:  # on the host in earnest; where does not matter to what is compiled
            step.finder.codes.fine = torch.zeros_like(step.finder.codes.signs)
        trees = shape.n_searches * shape.n_rows * shape.n_kv_heads
        nothing = np.zeros(2, np.int64)
        step.finder.update(np.arange(2), nothing, np.zeros(trees, np.int32), np.zeros(trees, np.bool_))
    zeros = torch.zeros(shape.n_rows, shape.n_kv_heads, 1, shape.key_dim, dtype=shape.dtype, device=shape.device)
    values = zeros.new_zeros(shape.n_rows, shape.n_kv_heads, 1, shape.value_dim)
    query = zeros.new_zeros(shape.n_rows, shape.n_kv_heads * shape.group, 1, shape.key_dim)
    for layer in range(shape.n_layers):
        step.attend(layer, query, zeros, values, 1.0, softcap)


class Loader:
    """Does such work in a thread of its own, each piece once."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._known: set[object] = set()

    def start(self, key: object, device: torch.device, work: Callable[[], None]) -> None:
        """Begin `work`, unless it was begun before, or other work is under way."""
        if key in self._known or self._thread is not None:
            return
        self._known.add(key)
        self._thread = threading.Thread(target=_run, args=(device, work), name="icecache-load", daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait for what was begun: nothing may be allocated beside a capture."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None


def _run(device: torch.device, work: Callable[[], None]) -> None:
    # Nobody waits for this: what goes wrong here goes wrong again in the step itself, which says so.
    with suppress(Exception), torch.no_grad():
        if device.type != "cuda":
            work()
            return
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with torch.cuda.device(device), torch.cuda.stream(stream):
            work()
            stream.synchronize()  # sync: this thread only
