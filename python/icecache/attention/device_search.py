"""The search of decode steps that choose their pages on the device: keeps its summaries what the pages are."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from icecache import _core
from icecache.attention.account import Read, count_read, read_of
from icecache.attention.device import DeviceStep, StepShape
from icecache.attention.finder import FinderShape, PageFinder
from icecache.attention.loading import load_step
from icecache.config import PAGE_TOKENS
from icecache.errors import BadTensorError, EngineError, SearchMemoryError
from icecache.pages import LayerPages
from icecache.select import Services

_GROWTH_PART = 64
"""A context may grow by this part, and some 1,000 tokens, before its summaries move; then the step is captured anew,
which takes .1 s at 36k tokens. Room that is not used yet counts as memory of the device."""
BOTH_BITS_BYTES = 1 << 30
"""Of summaries with both bits: 100k tokens of an 8B model. The search takes 57 us a layer then and 92 with one bit at
36k tokens, 151 and 142 at 300k (one H100)."""
_TICKET = 1
"""Nobody is asked, so nobody compares it."""


@dataclass(eq=False)
class _Held:
    """What a step searches."""

    mirror: _core.Mirror = field(default_factory=_core.Mirror)
    pages: list[weakref.ref[LayerPages]] = field(default_factory=list)
    """Weak: a sequence that is dropped gives its pages back."""
    changes: list[int] = field(default_factory=list)
    """Of these pages, as of the last look."""
    whole: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    """(S, R, H): tokens where a row is read whole, -1 elsewhere."""
    binding: int = 0
    in_flight: bool = False
    stale: bool = False
    """Whether the pages were let go of: what the device holds means nothing any more."""
    n_steps: int = 0
    uncounted: Read | None = None
    """What the last step read, while the statistics do not know it."""

    def release(self) -> None:
        """Let go of the pages."""
        self.pages = []
        self.stale = True
        self.mirror.clear()

    def foresee(self, forests: list[_core.Forest], n_slots: int, pool: _core.Pool) -> None:
        """Compare what the trees are about to be with what they were; in the background."""
        self.mirror.foresee(pool, forests, n_slots)
        if self.stale:  # let go of meanwhile
            self.mirror.clear()


class DeviceSearch:
    """Searches on the device, without the host in the step.

    Parameters
    ----------
    services : Services
        Of the runtime; the memory of its stores must be page-locked when a step is made for a CUDA device.
    bits : int or None, default=None
        Per element of a key on the device, 1 or 2; with 1 the second ones lie in page-locked host memory. None: 2 while
        summaries take at most `BOTH_BITS_BYTES`, 1 where they would take more.
    limit_bytes : int or None, default=None
        Most bytes of summaries of a step.
    """

    waits, estimates = False, True

    def __init__(self, services: Services, *, bits: int | None = None, limit_bytes: int | None = None) -> None:
        self._services, self._bits, self._limit = services, bits, limit_bytes
        self._held: dict[DeviceStep, _Held] = {}

    def mailbox(self, shape: StepShape) -> None:
        """Check that the device can read the pages in place; nobody is asked.

        Raises
        ------
        EngineError
            If it cannot.
        """
        if shape.device.type == "cuda" and not self._services.stores.is_pinned():
            msg = "the pages do not lie in page-locked memory"
            raise EngineError(msg)

    def load(self, shape: StepShape, needed: int, n_pages: int, softcap: float | None) -> None:
        """Compile the kernels of steps over trees of `needed` pages, of which `n_pages` are read."""
        load_step(shape, self._shape_for(shape, needed, n_pages), softcap)

    def prepare(self, step: DeviceStep, pages: Sequence[LayerPages], n_pages: int) -> None:
        """Search these pages from now on, as they are now. The step before is over.

        Raises
        ------
        SearchMemoryError
            If their summaries do not fit the limit or the device.
        """
        held = self._held.setdefault(step, _Held())
        leaders = [p for p in pages if p.place == 0]
        changes = [p.changes for p in leaders]
        same = len(held.pages) == len(leaders) and all(a() is b for a, b in zip(held.pages, leaders, strict=True))
        if same and held.changes == changes:
            return
        with self._services.recorder.part("summaries"):
            self._look(held, step, [forest for p in leaders for forest in p.forests], n_pages)
        held.changes = changes
        if not same:
            held.binding += 1
            held.pages = [weakref.ref(p) for p in leaders]
            weakref.finalize(leaders[0], _forget, weakref.ref(held), held.binding)

    def _look(self, held: _Held, step: DeviceStep, forests: list[_core.Forest], n_pages: int) -> None:
        if held.stale and step.finder is not None:
            step.finder.reset()
        held.stale = False
        n_slots = 0 if step.finder is None else step.finder.shape.n_slots
        slots, words, extents, tokens, needed = held.mirror.update(self._services.pool, forests, n_slots)
        if step.finder is None or needed > n_slots:
            held.mirror.clear()
            n_slots = self._grow(step, needed, n_pages)
            slots, words, extents, tokens, _ = held.mirror.update(self._services.pool, forests, n_slots)
        assert step.finder is not None, "it was made above"
        whole = tokens <= n_pages * PAGE_TOKENS
        step.finder.update(slots, words, extents, whole)
        shape = step.shape
        held.whole = np.where(whole, tokens, -1).reshape(shape.n_searches, shape.n_rows, shape.n_kv_heads)

    def _grow(self, step: DeviceStep, needed: int, n_pages: int) -> int:
        """Make room for `needed` slots a tree; what was summarised is lost."""
        from icecache.kernels.page_select import MAX_SLOTS

        step.finder = None  # first: two would not fit
        if needed > MAX_SLOTS:
            msg = f"a row has {needed} pages a head, the device searches at most {MAX_SLOTS}"
            raise SearchMemoryError(msg)
        shape = self._shape_for(step.shape, needed, n_pages)
        n_bytes = shape.nbytes(step.shape)
        if self._limit is not None and n_bytes > self._limit:
            msg = f"page summaries need {n_bytes} bytes on the device, search_memory is {self._limit}"
            raise SearchMemoryError(msg, needed_bytes=n_bytes, available_bytes=self._limit)
        step.epoch += 1
        try:
            stores = self._services.stores
            step.finder = PageFinder(step.shape, shape, None if stores.memory is None else stores.lend)
        except torch.OutOfMemoryError as error:
            msg = f"page summaries need {n_bytes} bytes on the device, which has no room for them"
            raise SearchMemoryError(msg, needed_bytes=n_bytes) from error
        except MemoryError as error:
            msg = f"the second bits of page summaries, which host_memory pays for: {error}; search_bits=2 needs none"
            raise SearchMemoryError(msg, needed_bytes=shape.host_bytes(step.shape)) from error
        return shape.n_slots

    def _shape_for(self, step: StepShape, needed: int, n_pages: int) -> FinderShape:
        """Room to grow and both bits as far as they fit, and at least what is needed."""
        from icecache.kernels.page_select import MAX_SLOTS

        def made(bits: int, n: int) -> FinderShape:
            return FinderShape(min(n + -n % 64, MAX_SLOTS), bits, n_pages)

        room, bits = needed + needed // _GROWTH_PART + 64, self._bits or 1
        shapes, both = [made(bits, room), made(bits, needed)], made(2, room)
        if self._bits is None and both.nbytes(step) <= BOTH_BITS_BYTES:
            shapes.insert(0, both)
        limit = self._limit
        return next((x for x in shapes if limit is None or x.nbytes(step) <= limit), shapes[-1])

    def begin(self, step: DeviceStep, pages: Sequence[LayerPages], n_pages: int) -> int:  # noqa: ARG002
        """Nothing is left to do: `prepare` has looked at the pages."""
        self._held[step].in_flight = True
        return _TICKET

    def end(self, step: DeviceStep) -> None:
        """Take down what was read, and raise what went wrong.

        Raises
        ------
        BadTensorError
            If a query held NaN or infinity.
        EngineError
            If a row that fits the budget was not read whole: a bug.
        """
        held, finder = self._held[step], step.finder
        held.in_flight = False
        if held.pages and held.pages[0]() is None:
            held.release()
        assert finder is not None, "a step that ran has a finder"
        bad = np.isnan(finder.host_lse.numpy()).any((3, 4))
        if bad.any():
            search, row, head = np.argwhere(bad)[0]
            layer = step.shape.number(step.shape.leaders[search])
            msg = f"layer {layer}, row {row}, KV head {head}: a query is not finite"
            raise BadTensorError(msg)
        self.account()  # nothing, as a rule: it was done beside the step
        read = read_of(step, finder.host_table, finder.host_lse, held.n_steps)
        held.uncounted, held.n_steps = read, held.n_steps + 1
        if (held.whole >= 0).any():
            _check_whole(step.shape, read.tokens(), held.whole)

    def beside(self, step: DeviceStep, pages: Sequence[LayerPages], *, handed: bool) -> None:
        """Count the step before; where tokens are on their way into the trees, look ahead behind their inserts."""
        self.account()
        held, finder = self._held[step], step.finder
        if handed and finder is not None and not held.stale:
            ahead = [(p, b, p.handed[b]) for p in pages if p.place == 0 for b in range(p.n_rows)]
            forests = [p.forests[b] if way is None else way.ahead.forest for p, b, way in ahead]
            self._services.inserter.also(functools.partial(held.foresee, forests, finder.shape.n_slots))

    def account(self) -> None:
        """Add to the statistics what is not in them yet."""
        for held in self._held.values():
            if held.uncounted is not None:
                count_read(self._services, held.uncounted)
                held.uncounted = None

    def close(self) -> None:
        """Let go of all sequences; no step is in flight."""
        self.account()
        for step, held in self._held.items():
            if step.shape.device.type == "cuda":
                torch.cuda.synchronize(step.shape.device)  # sync: summaries may still be read from the pages
            held.release()
            step.finder = None
        self._held.clear()


def _check_whole(shape: StepShape, read: npt.NDArray[np.int64], whole: npt.NDArray[np.int64]) -> None:
    """Raise EngineError if of rows that are read whole something was not."""
    missing = (whole >= 0) & (read != whole)
    if missing.any():
        search, row, head = np.argwhere(missing)[0]
        got, all_of_it = read[search, row, head], whole[search, row, head]
        layer = shape.number(shape.leaders[search])
        msg = f"layer {layer}, row {row}, KV head {head}: {got} of {all_of_it} tokens were read, all fit the budget"
        raise EngineError(msg)


def _forget(reference: weakref.ref[_Held], binding: int) -> None:
    """Free the pages of a sequence that was dropped, unless another one is searched by now."""
    held = reference()
    if held is not None and held.binding == binding and not held.in_flight:
        held.release()
