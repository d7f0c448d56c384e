"""The host side of decode steps that run on the device: the engine's workers search the trees and fill the mailbox."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from icecache import _core
from icecache.attention.account import count_read, read_of
from icecache.attention.device import DeviceStep, StepShape
from icecache.attention.loading import load_step
from icecache.errors import EngineError
from icecache.pages import LayerPages
from icecache.pages.store import dtype_name
from icecache.select import Services
from icecache.transfer import MailboxShape, MailboxTensors, open_mailbox


@dataclass(eq=False)
class _Box:
    """A mailbox and what it searches."""

    box: _core.Mailbox
    tensors: MailboxTensors
    pages: list[weakref.ref[LayerPages]] = field(default_factory=list)
    """Bound pages of every layer. Weak: a sequence that is dropped gives its pages back."""
    changes: list[int] = field(default_factory=list)
    """Of these pages, as of the snapshot that is searched."""
    binding: int = 0
    in_flight: bool = False
    n_steps: int = 0


class EngineSearch:
    """Answers the mailboxes of all steps of one runtime.

    Parameters
    ----------
    start : callable
        Makes the engine whose workers search, when the first step is made.
    services : Services
        Of the runtime; the memory of its stores must be page-locked when a step is made for a CUDA device.
    """

    waits, estimates = True, False

    def __init__(self, start: Callable[[], _core.Engine], services: Services) -> None:
        self._start, self._services = start, services
        self._engine: _core.Engine | None = None
        self._boxes: dict[int, _Box] = {}
        self._memory: _core.HostMemory | None = None

    def mailbox(self, shape: StepShape) -> MailboxTensors:
        """Make the mailbox of steps of this shape.

        Raises
        ------
        EngineError
            If the device cannot read the pages in place.
        """
        stores = self._services.stores
        if shape.device.type == "cuda" and not stores.is_pinned():
            msg = "the pages do not lie in page-locked memory"
            raise EngineError(msg)
        memory = stores.memory
        if memory is None:  # a device that is the CPU itself: any memory will do
            memory = self._memory = self._memory or _core.HostMemory(self._services.pool, pin="never")
        if self._engine is None:
            self._engine = self._start()
        axes = MailboxShape(
            n_layers=shape.n_searches,
            n_rows=shape.n_rows,
            n_kv_heads=shape.n_kv_heads,
            group=shape.group,
            key_dim=shape.key_dim,
            capacity=shape.n_pages,
            dtype=dtype_name(shape.dtype),
        )
        box, tensors = open_mailbox(self._engine, memory, axes)
        self._boxes[id(tensors)] = _Box(box, tensors)
        return tensors

    def load(self, shape: StepShape, needed: int, n_pages: int, softcap: float | None) -> None:  # noqa: ARG002
        """Compile the kernels of a step, those of the mailbox aside."""
        load_step(shape, None, softcap)

    def prepare(self, step: DeviceStep, pages: Sequence[LayerPages], n_pages: int) -> None:
        """Nothing to do: the host's memory of a mailbox never moves."""

    def begin(self, step: DeviceStep, pages: Sequence[LayerPages], n_pages: int) -> int:
        """Search these pages from now on, as they are now.

        Raises
        ------
        EngineError
            If a worker is still busy with an earlier step.
        """
        held = self._boxes[id(step.mailbox)]
        leaders = [p for p in pages if p.place == 0]
        changes = [p.changes for p in leaders]
        same = len(held.pages) == len(leaders) and all(a() is b for a, b in zip(held.pages, leaders, strict=True))
        if not same:
            self._bind(held, step, leaders, n_pages)
        ticket = held.box.begin_step(refresh=held.changes != changes)
        held.changes, held.in_flight = changes, True
        return ticket

    def _bind(self, held: _Box, step: DeviceStep, pages: Sequence[LayerPages], n_pages: int) -> None:
        held.pages = []
        held.binding += 1
        for group, (layer, p) in enumerate(zip(step.shape.leaders, pages, strict=True)):
            scaling = step.scaling[layer]
            assert scaling is not None, "a step is bound after its rehearsal"
            held.box.bind(
                group,
                p.forests,
                n_pages,
                scaling=scaling,
                softcap=step.softcap[layer],
                candidates=self._services.candidates,
            )
        held.pages = [weakref.ref(p) for p in pages]
        weakref.finalize(pages[0], _forget, weakref.ref(held), held.binding)

    def end(self, step: DeviceStep) -> None:
        """Stop answering, count what was read, and raise what went wrong.

        Raises
        ------
        EngineError
            If a worker failed or an answer came too late for the device.
        """
        held = self._boxes[id(step.mailbox)]
        held.in_flight = False
        held.box.end_step()
        if held.pages and held.pages[0]() is None:
            held.pages = []
            held.box.unbind()
        self._count(held, step)

    def beside(self, step: DeviceStep, pages: Sequence[LayerPages], *, handed: bool) -> None:
        """Nothing to do: nobody may keep the device waiting for the workers."""

    def account(self) -> None:
        """Nothing is left to do."""

    def close(self) -> None:
        """Let go of all sequences and mailboxes; no step is in flight."""
        for held in self._boxes.values():
            held.box.unbind()
        self._boxes.clear()

    def _count(self, held: _Box, step: DeviceStep) -> None:
        times = held.box.times()
        self._services.recorder.ms["search"] += float((times[:, 1] - times[:, 0]).sum()) / 1e6
        table, lse = held.tensors.table, held.tensors.lse
        n_rows = step.shape.n_rows
        count_read(self._services, read_of(step, table[:, :n_rows], lse[:, :n_rows], held.n_steps))
        held.n_steps += 1


def _forget(reference: weakref.ref[_Box], binding: int) -> None:
    """Free the pages of a sequence that was dropped, unless another one is searched by now."""
    held = reference()
    if held is not None and held.binding == binding and not held.in_flight:
        held.pages = []
        held.box.unbind()
