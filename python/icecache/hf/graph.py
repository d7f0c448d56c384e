"""Decode steps that run as one CUDA graph around the unmodified model.

`model.forward` is overridden on the instance, the one thing hooks cannot do: skip a forward. The override replays a
captured graph where it can serve the call, and calls the model's own forward everywhere else. Everything around it
(generate, processors, streamers, the opening and closing hooks) does not notice.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import torch

from icecache import _core
from icecache.attention import DeviceSearch, DeviceStep, EngineSearch, Loader, StepShape, shared_sizes
from icecache.config import PAGE_TOKENS
from icecache.errors import EngineError, IceCacheError, SearchMemoryError
from icecache.hf.capture import Captured, capture, write_state
from icecache.hf.request import NotCapturableError, Request, read_request
from icecache.hf.segments import CudaRecorder, Recorder
from icecache.hf.step import Engine, Step, current_step
from icecache.pages import LayerPages
from icecache.select import TreeSearch
from icecache.transfer import MailboxTensors

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from icecache.hf.cache import RetrievalLayer


_SLOW = "decode steps are not captured in a CUDA graph and run op by op, which is slower: {}"
_HOST_SEARCHES = "pages are searched on the host, which is slower: {}. search='cpu' asks for this without a warning"


class Search(Protocol):
    """Who chooses the pages of a step: the host's workers, or a fixed choice in benchmarks."""

    waits: bool
    """Whether the device waits for the host within a step: then nothing may be allocated or loaded beside it."""
    estimates: bool
    """Whether pages that are not chosen can be estimated."""

    def mailbox(self, shape: StepShape) -> MailboxTensors | None:
        """Make a mailbox for steps of this shape; None: the table is filled by somebody else.

        Raises EngineError if there can be none.
        """
        ...

    def load(self, shape: StepShape, needed: int, n_pages: int, softcap: float | None) -> None:
        """Compile the kernels of steps over trees of some `needed` pages; in another thread than the rest."""
        ...

    def prepare(self, step: DeviceStep, pages: Sequence[LayerPages], n_pages: int) -> None:
        """Make ready for these pages before the step is captured or begun; the step before is over.

        Raises EngineError, SearchMemoryError if another search may do.
        """
        ...

    def begin(self, step: DeviceStep, pages: Sequence[LayerPages], n_pages: int) -> int:
        """Start to answer for these pages; returns the ticket of the step."""
        ...

    def end(self, step: DeviceStep) -> None:
        """Stop answering, and raise what went wrong. The device is done with the step."""
        ...

    def beside(self, step: DeviceStep, pages: Sequence[LayerPages], *, handed: bool) -> None:
        """Do what no step has to wait for, while the device computes; `handed`: tokens are about to be inserted."""
        ...

    def account(self) -> None:
        """Add to the statistics what is not in them yet of steps that are over."""
        ...

    def close(self) -> None:
        """Let go of everything; no step is in flight."""
        ...


class GraphDecoder:
    """Serves the decode steps of one wrapped model.

    Parameters
    ----------
    model : PreTrainedModel
    engine : Engine
        Shared with the layers of every cache.
    search : Search
    recorder : callable or None
        Makes what records a step, by default as CUDA graphs. None: run the same steps without a graph, on any device
        (tests).
    fallback : callable or None, default=None
        Makes the search that takes over, with a warning, when the first one lacks memory on the device.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        engine: Engine,
        search: Search,
        *,
        recorder: Callable[[], Recorder] | None = CudaRecorder,
        fallback: Callable[[], Search] | None = None,
    ) -> None:
        self.model, self.engine, self.search, self._recorder = model, engine, search, recorder
        self._fallback = fallback
        self._names: list[str] = []
        self._own = model.forward
        self._steps: dict[StepShape, DeviceStep] = {}
        self._captured: dict[tuple[StepShape, int, object], Captured] = {}
        self._running: DeviceStep | None = None
        self._done: torch.cuda.Event | None = None
        self._loader = Loader()
        self.refused: str | None = None
        """Why the steps of this model are not captured; None: nothing is known against it."""

    def install(self, names: list[str]) -> None:
        """Override ``model.forward``; `names` are its positional parameters."""
        self._names, self._own = names, self.model.forward

        @functools.wraps(self._own)
        def forward(*args: object, **kwargs: object) -> object:
            step = current_step()
            request = self._request(step, {**dict(zip(names, args, strict=False)), **kwargs})
            output = None if step is None or request is None else self._decode(step, request)
            return self._own(*args, **kwargs) if output is None else output

        self.model.forward = forward
        self.engine.expect = self._expect

    def remove(self) -> None:
        """Take the override away and free the buffers; never raises for a step that failed."""
        self.model.__dict__.pop("forward", None)
        self.engine.expect = None
        self._loader.finish()
        try:
            self.settle()
        except Exception as error:
            warnings.warn(f"the last decode step had failed: {error}", stacklevel=3)
        self._drop_steps()

    def settle(self, *, account: bool = True) -> None:
        """Wait for the step in flight and report what went wrong in it.

        Parameters
        ----------
        account : bool, default=True
            Complete the statistics; False: while the next step is computed.

        Raises
        ------
        EngineError
            If the search failed or came too late; the step used the pages of the step before.
        """
        step, self._running = self._running, None
        if step is not None:
            if self._done is not None:
                self._done.synchronize()  # sync: the step before must be over; generate has waited for it already
            self.search.end(step)
        if account:
            self.search.account()

    def summary_bytes(self) -> int:
        """Bytes of summaries of pages on the device."""
        return sum(step.finder.nbytes() for step in self._steps.values() if step.finder is not None)

    def device_bytes(self) -> int:
        """Bytes of tables and of near buffers, whether a sequence lives in them or not."""
        return sum(step.nbytes() for step in self._steps.values())

    def _request(self, step: Step | None, arguments: dict[str, object]) -> Request | None:
        if self.refused is not None or step is None or step.engine is not self.engine or not step.paged:
            return None
        if self.engine.services.trace is not None:  # only the eager step knows what it read
            return None
        try:
            request = read_request(step, arguments)
        except NotCapturableError as error:
            self._refuse(error)
            return None
        if (
            request is not None
            and self._recorder is CudaRecorder
            and not all(x.is_cuda for x in request.inputs.values())
        ):
            return None
        return request

    def _give_up(self, error: NotCapturableError) -> None:
        """Refuse a model in the middle of a step; the step runs op by op."""
        self._mark_end()
        with suppress(IceCacheError):  # nobody uses this step
            self.settle()
        self._refuse(error)

    def _refuse(self, error: Exception) -> None:
        self.refused = str(error)
        self._drop_steps()  # nobody will use their memory
        warnings.warn(_SLOW.format(error), stacklevel=6)

    def _decode(self, now: Step, request: Request) -> object | None:
        """Run one step; None: it could not be captured, and nothing has changed."""
        self._loader.finish()
        try:
            try:
                step = self._prepared(request)
            except SearchMemoryError as error:
                self._fall_back(error)
                step = self._prepared(request)
            captured = self._captured_for(now, step, request)
        except (NotCapturableError, EngineError) as error:
            self._refuse(error)
            return None
        for name, static in captured.inputs.items():
            given = request.inputs.get(name)
            if given is None:
                static.fill_(request.length)
            else:
                static.copy_(given)
        services, waits = self.engine.services, self.search.waits
        if waits:
            services.hand_over(request.pages)  # now: the device is idle, and these tokens are there
        ticket = self.search.begin(step, request.pages, self.engine.services.n_pages)
        self._running = step
        write_state(step, ticket, request)
        try:
            captured.run(now, request)
        except NotCapturableError as error:
            self._give_up(error)
            return None
        self._mark_end()
        if not waits:
            self.search.beside(step, request.pages, handed=services.hand_over(request.pages))
        for layer in request.layers:
            layer.commit_one()
        if step.static is not None:
            step.static.count_one([x.layer for x in request.static])
        now.n_attention_calls += len(request.layers)
        output: object = captured.output(request)
        return output

    def _mark_end(self) -> None:
        """Note on the current stream that the step under way ends here."""
        if self._running is not None and self._running.shape.device.type == "cuda":
            self._done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._done.record()

    def _prepared(self, request: Request) -> DeviceStep:
        step = self._step_of(request)
        epoch = step.epoch
        self.search.prepare(step, request.pages, self.engine.services.n_pages)
        if step.static is not None and step.static.hold([x.layer for x in request.static]):
            step.epoch += 1
        if step.epoch != epoch:  # its graphs name memory that is gone
            self._captured = {key: x for key, x in self._captured.items() if key[0] != step.shape}
        return step

    def _fall_back(self, error: SearchMemoryError) -> None:
        if self._fallback is None:
            raise error
        warnings.warn(f"{_HOST_SEARCHES.format(error)}", stacklevel=6)
        self._drop_steps()
        self.search, self._fallback = self._fallback(), None

    def _drop_steps(self) -> None:
        for step in self._steps.values():
            step.release()
        self._captured.clear()
        self._steps.clear()
        self.search.close()

    def _captured_for(self, now: Step, step: DeviceStep, request: Request) -> Captured:
        step.hold([pages.near for pages in request.pages])
        for pages in request.pages:
            pages.near.reserve_one()
        key = step.shape, step.epoch, request.kind
        captured = self._captured.get(key)
        if captured is None:
            captured = self._captured[key] = capture(self._own, now, step, request, self._recorder)
        return captured

    def _expect(self, layer: RetrievalLayer, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Compile the kernels of the steps behind a prompt while it is computed; nobody waits until the first one."""
        if self.refused is not None or layer.group is None or self._recorder is not CudaRecorder or not keys.is_cuda:
            return
        known, services = layer.sequence.layers, self.engine.services
        groups = dict.fromkeys(x.members for i in sorted(known) if (x := known[i]()) is not None)
        sizes = tuple(len(members) for members in groups)
        shape = self._shape(keys, values, layer.group, len(known), shared_sizes(sizes))
        needed = keys.shape[2] // PAGE_TOKENS
        load = functools.partial(self.search.load, shape, needed, services.n_pages, layer.softcap)
        self._loader.start((shape, needed.bit_length()), keys.device, load)

    def _shape(
        self, keys: torch.Tensor, values: torch.Tensor, group: int, n_layers: int, shared: tuple[int, ...]
    ) -> StepShape:
        """Shape of a step, for keys (B, H, n, D) and values (B, H, n, Dv)."""
        layout = self.engine.layout
        return StepShape(
            n_layers=n_layers,
            n_rows=keys.shape[0],
            n_kv_heads=keys.shape[1],
            group=group,
            key_dim=keys.shape[3],
            value_dim=values.shape[3],
            # A row that fits the budget is read whole, and pages of the tail are half full at worst.
            n_pages=2 * self.engine.services.n_pages + 2,
            near_tokens=layout.sink_tokens + layout.window_tokens + PAGE_TOKENS + 1,
            dtype=keys.dtype,
            device=keys.device,
            shared=shared,
            estimates=self.engine.services.stores.value_means and self.search.estimates,
        )

    def _step_of(self, request: Request) -> DeviceStep:
        near = request.pages[0].near
        sizes = tuple(pages.shelf.n_places for pages in request.pages if pages.place == 0)
        shape = self._shape(near.keys, near.values, request.group, len(request.pages), shared_sizes(sizes))
        if request.static:
            numbers = tuple(layer.layer_idx for layer in request.layers)
            shape = replace(shape, numbers=numbers, static=tuple(x.shape() for x in request.static))
        step = self._steps.get(shape)
        if step is None:
            step = self._steps[shape] = DeviceStep(shape, self.search.mailbox(shape))
        return step


def decoder_for(model: PreTrainedModel, engine: Engine) -> GraphDecoder | None:
    """Make a decoder for a model that is being wrapped.

    None: its steps stay eager; that is a warning unless it was asked for, or there is no GPU.
    """
    services, selector = engine.services, engine.services.selector
    if engine.config.decode == "eager" or not torch.cuda.is_available() or torch.version.hip is not None:
        return None
    if not isinstance(selector, TreeSearch) or selector.exact:
        return None
    reason = None
    if importlib.util.find_spec("triton") is None:
        reason = "triton is not installed"
    elif "forward" in model.__dict__:
        reason = "something else has replaced model.forward"
    elif engine.config.estimate_unread and engine.config.search == "cpu":
        reason = "search workers do not estimate pages that are not read (estimate_unread), search='gpu' does"
    elif engine.config.search == "cpu" and _core.default_workers() == 0:
        reason = "too few cores for workers that poll; 4 are the least"
    if reason is not None:
        warnings.warn(_SLOW.format(reason), stacklevel=5)
        return None
    config = engine.config

    def on_host() -> Search:
        return EngineSearch(_core.Engine, services)

    if config.search == "cpu":
        return GraphDecoder(model, engine, on_host())
    search = DeviceSearch(services, bits=config.search_bits, limit_bytes=config.search_memory)
    falls_back = _core.default_workers() > 0 and not config.estimate_unread
    return GraphDecoder(model, engine, search, fallback=on_host if falls_back else None)
