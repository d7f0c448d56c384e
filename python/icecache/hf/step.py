"""State of a forward pass: which runtime runs it, what the masks were, and how to undo it.

A forward of a wrapped model is a *step*. The pre-hook opens it, the forward hook closes it. A step that ends in an
exception is rolled back by the hook; one that ends in Ctrl-C leaves no hook a chance, so the layers roll it back when
they are next asked for anything from outside the forward.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING

import torch

from icecache.attention import DeviceStep
from icecache.config import IceConfig
from icecache.errors import CacheStateError
from icecache.pages import Layout
from icecache.select import MaskPolicy, Services

if TYPE_CHECKING:
    from icecache.hf.cache import RetrievalLayer


@dataclass(eq=False, slots=True)
class Engine:
    """What a runtime shares with all layers of all its caches. Knows neither the model nor the caches."""

    config: IceConfig
    layout: Layout
    services: Services
    sparse_chunks: bool
    """Whether later chunks are processed token by token (asked for, or the policy keeps no middle)."""
    masks: MaskPolicy | None = None
    """The policy that keeps everything on the device and masks it; None: pages."""
    expect: Callable[[RetrievalLayer, torch.Tensor, torch.Tensor], None] | None = None
    """Told of the first layer of a prompt, its keys and its values, while the others are still being computed."""
    n_layers: int = 0
    """Layers of the model."""
    closed: bool = False
    _layers: weakref.WeakSet[RetrievalLayer] = field(default_factory=weakref.WeakSet)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def register(self, layer: RetrievalLayer) -> None:
        """Count `layer` among the live ones until it dies."""
        with self._lock:
            self._layers.add(layer)

    def live_layers(self) -> list[RetrievalLayer]:
        """All layers of all caches that are alive; other threads may go on making caches meanwhile."""
        with self._lock:
            return list(self._layers)


@dataclass(eq=False, slots=True)
class Step:
    """One forward of a wrapped model with one of our caches (or with none: then `sequence` is None)."""

    engine: Engine
    caller_arguments: frozenset[str]
    """Names the caller gave to the model's forward; they travel down to the attention function."""
    frame: FrameType | None
    """The frame that runs the forward: while it is on the stack, the step is in progress."""
    sequence: Sequence | None = None
    undo: Callable[[], None] | None = None
    paged: bool = False
    """Whether some layer reads pages in this step; masks stay None or 2D then."""
    n_attention_calls: int = 0
    causal_mask: torch.Tensor | None = None
    """What our mask function returned for plain causal attention."""
    padding: torch.Tensor | None = None
    """Bool (n_rows, kv_length): the 2D padding mask behind `causal_mask`."""

    past_checked: bool = False
    """Whether the mask of this step was compared with those of earlier steps."""

    device: DeviceStep | None = None
    """Static buffers that the layers attend on instead of their own, while a graph is rehearsed or captured."""

    chunk: tuple[torch.Tensor, int, torch.Tensor | None] | None = None
    """A 2D mask that was read: the mask, n new positions, and bool (n_rows, n) on the CPU: tokens; None: all are."""

    new_valid: torch.Tensor | None = None
    """In a decode step: bool (n_rows, 1) on the CPU, which new positions are tokens; None: all."""

    def in_progress(self) -> bool:
        """Whether the caller runs inside this step's forward."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if frame is self.frame:
                return True
            frame = frame.f_back
        return False


@dataclass(eq=False, slots=True)
class Sequence:
    """What the retrieval layers of one cache have in common."""

    step: Step | None = None
    broken: str | None = None
    """Why the cache cannot go on; None: it can."""
    shared: dict[str, torch.Tensor] = field(default_factory=dict)
    """What a policy tells later layers of the same step."""
    layers: dict[int, weakref.ref[RetrievalLayer]] = field(default_factory=dict)
    """The retrieval layers by number: those that share pages find each other here."""

    def settle(self) -> None:
        """Roll back a step that never ended (Ctrl-C in the middle of a forward)."""
        step = self.step
        if step is not None and not step.in_progress():
            self.close()
            if step.undo is not None:
                step.undo()

    def close(self) -> None:
        """End the current step; the frame goes too, or it would keep its tensors alive."""
        if self.step is not None:
            self.step.frame = None
        self.step = None

    def check(self) -> None:
        """Raise if an earlier failure left the cache unusable."""
        if self.broken is not None:
            raise CacheStateError(self.broken)


_local = threading.local()


def current_step() -> Step | None:
    """Step this thread is in, if any."""
    return getattr(_local, "step", None)


def set_current_step(step: Step | None) -> None:
    """Make `step` the one this thread is in."""
    _local.step = step
