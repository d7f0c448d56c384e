"""Decode steps of which some modules cannot be captured: a graph before each of them, and one behind.

A module that waits for the device (RoPE whose frequencies depend on the longest position, say) cannot be part of a CUDA
graph. It is found during a rehearsal, by the operations it dispatches, or where an operation hides it, by the error of
the recording. It runs op by op between two pieces: on each replay with what the piece before it has computed, its
results copied to where the piece behind it reads them.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Protocol, cast

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from icecache.errors import UnsupportedModelError
from icecache.hf.request import NotCapturableError
from icecache.hf.step import Step

Replay = Callable[[], None]


class Recorder(Protocol):
    """Records what is enqueued between `begin` and `end`, one piece after the other."""

    def begin(self) -> None:
        """Start a piece."""
        ...

    def end(self) -> Replay:
        """End the piece; returns what runs it again, in the memory of this time."""
        ...


class CudaRecorder:
    """Pieces as CUDA graphs that share one pool of memory: they are only replayed in order."""

    def __init__(self) -> None:
        self._graph: torch.cuda.CUDAGraph | None = None
        self._context: torch.cuda.graph | None = None
        self._pool: torch.cuda._POOL_HANDLE | None = None

    def begin(self) -> None:
        """Start a piece; waits for the device."""
        self._graph = torch.cuda.CUDAGraph()
        # thread_local: a thread that pages in a prompt may allocate meanwhile.
        self._context = torch.cuda.graph(self._graph, pool=self._pool, capture_error_mode="thread_local")
        self._context.__enter__()

    def end(self) -> Replay:
        """End the piece, or clean up behind one that failed."""
        graph, context = self._graph, self._context
        assert graph is not None
        assert context is not None
        self._context = None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The CUDA Graph is empty")  # two modules, nothing between
            context.__exit__(*sys.exc_info())
        self._pool = self._pool or graph.pool()
        return graph.replay


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes which modules wait for the device. Thread-local, unlike torch's own mode for this."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.waiting: dict[torch.nn.Module, str] = {}
        """Innermost modules, and the first operation of each."""

    def __torch_dispatch__(
        self,
        func: torch._ops.OpOverload,
        types: object,
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Run the operation; if it waits, remember for whom."""
        if waits(func, args, kwargs or {}):
            module = _innermost_module(sys._getframe(1))
            if module is not None:
                self.waiting.setdefault(module, str(func))
        return func(*args, **(kwargs or {}))


def waits(func: torch._ops.OpOverload, args: tuple[object, ...], kwargs: Mapping[str, object]) -> bool:
    """Whether the host waits for the device in this operation: it needs a value, a shape, or moves data."""
    tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
    if func is torch.ops.aten.index.Tensor:
        indices = cast("list[torch.Tensor | None]", args[1])
        return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in indices)
    if func is torch.ops.aten.copy_.default:
        return len({x.device.type for x in tensors}) > 1 and not _asynchronous(args, kwargs)
    if func is torch.ops.aten._to_copy.default:
        target = kwargs.get("device")
        moves = target is not None and torch.device(cast("str", target)).type != tensors[0].device.type
        return moves and not _asynchronous(args, kwargs)
    return torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags


def _asynchronous(args: tuple[object, ...], kwargs: Mapping[str, object]) -> bool:
    return bool(kwargs.get("non_blocking", len(args) > 2 and args[2]))


def _innermost_module(frame: FrameType | None) -> torch.nn.Module | None:
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, torch.nn.Module):
            return owner
        frame = frame.f_back
    return None


def failed_modules(error: BaseException) -> list[torch.nn.Module]:
    """Find where a recording broke off: the innermost module on the way to `error`, and all others of its class.

    Those of other layers would fail next.
    """
    path: list[torch.nn.Module] = []
    cause: BaseException | None = error
    while cause is not None:  # the end of a broken recording fails, too, and hides the error that broke it
        trace, found = cause.__traceback__, []
        while trace is not None:
            owner = trace.tb_frame.f_locals.get("self")
            found += [owner] if isinstance(owner, torch.nn.Module) else []
            trace = trace.tb_next
        path, cause = (found if len(found) >= len(path) else path), cause.__context__
    return [x for x in path[0].modules() if type(x) is type(path[-1])] if path else []


@dataclass(eq=False)
class _Break:
    """One call of a module that runs apart."""

    run: Callable[[], object]
    outputs: object
    """Static: written by each run, read by the piece behind it."""


@dataclass(eq=False)
class Segments:
    """Makes pieces of a call of which the given modules run apart.

    Parameters
    ----------
    waiting : dict
        What `Watch` found.
    """

    waiting: dict[torch.nn.Module, str]
    _outputs: list[object] = field(default_factory=list)
    """Of each call of such a module, in order, as rehearsed."""

    def rehearse(self, now: Step, call: Callable[[], object]) -> None:
        """Run `call` and remember what these modules return.

        Raises
        ------
        UnsupportedModelError
            If one of them attends: its attention would have to run within a graph and outside of it.
        """
        self._outputs.clear()

        def remember(module: torch.nn.Module, own: Callable[..., object], *args: object, **kwargs: object) -> object:
            before = now.n_attention_calls
            output = own(*args, **kwargs)
            if now.n_attention_calls != before:
                msg = f"{type(module).__name__} attends, and waits for the device in {self.waiting[module]}"
                raise UnsupportedModelError(msg)
            self._outputs.append(_mapped(torch.Tensor.clone, output))
            return output

        with self._replaced(remember):
            call()

    def record(self, recorder: Recorder, call: Callable[[], object]) -> tuple[object, Replay]:
        """Record `call`; returns its output and what runs all of it again."""
        pieces: list[Replay] = []
        breaks: list[_Break] = []
        outputs = iter(self._outputs)

        def interrupt(_: torch.nn.Module, own: Callable[..., object], *args: object, **kwargs: object) -> object:
            pieces.append(recorder.end())
            breaks.append(_Break(lambda: own(*args, **kwargs), next(outputs)))
            recorder.begin()
            return breaks[-1].outputs

        with self._replaced(interrupt):
            recorder.begin()
            try:
                output = call()
            finally:
                pieces.append(recorder.end())

        def replay() -> None:
            pieces[0]()
            for between, piece in zip(breaks, pieces[1:], strict=True):
                _write(between.run(), between.outputs)
                piece()

        return output, replay if breaks else pieces[0]

    @contextmanager
    def _replaced(self, by: Callable[..., object]) -> Iterator[None]:
        """Override ``forward`` of the modules, on the instances; of nested ones only the outermost counts."""
        inside = {x for module in self.waiting for x in module.modules() if x is not module}
        before = []
        try:
            for module in (x for x in self.waiting if x not in inside):
                before.append((module, module.__dict__.get("forward")))
                module.forward = _bound(by, module, module.forward)
            yield
        finally:
            for module, own in before:
                del module.forward
                if own is not None:
                    module.forward = own


def _bound(by: Callable[..., object], module: torch.nn.Module, own: Callable[..., object]) -> Callable[..., object]:
    return lambda *args, **kwargs: by(module, own, *args, **kwargs)


def _mapped(change: Callable[[torch.Tensor], torch.Tensor], output: object) -> object:
    """Apply `change` to all tensors of what a module returned."""
    if isinstance(output, torch.Tensor):
        return change(output)
    if isinstance(output, (tuple, list)):
        return type(output)([_mapped(change, x) for x in output])
    if output is None or isinstance(output, (bool, int, float, str)):
        return output
    msg = f"a module that waits for the device returns a {type(output).__name__}"
    raise UnsupportedModelError(msg)


def _write(output: object, static: object) -> None:
    """Copy what a module returned now over what it returned when it was rehearsed."""
    if isinstance(output, torch.Tensor) and isinstance(static, torch.Tensor) and output.shape == static.shape:
        static.copy_(output)
        return
    if isinstance(output, (tuple, list)) and isinstance(static, (tuple, list)) and len(output) == len(static):
        for x, y in zip(output, static, strict=True):
            _write(x, y)
        return
    if isinstance(output, torch.Tensor) or output != static:
        msg = "a module that waits for the device returns something else at each step"
        raise NotCapturableError(msg)
