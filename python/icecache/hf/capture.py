"""Capture one decode step of a model as a CUDA graph.

First two *rehearsals* on the static buffers, with a mailbox that is answered beforehand: every kernel is loaded and
every workspace allocated before anything has to wait for the host, because loading a module may wait for running
kernels; and modules that cannot be captured are found. Then the same forward is captured. All of them write only what
each replay writes again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput

from icecache.attention import DeviceStep
from icecache.errors import UnsupportedModelError
from icecache.hf.names import CACHE_NAMES, cache_argument
from icecache.hf.request import STATIC, NotCapturableError, Request
from icecache.hf.segments import Recorder, Segments, Watch, failed_modules
from icecache.hf.static import StandIn
from icecache.hf.step import Step

REHEARSAL_TICKET = 0
"""No step has this ticket."""

Forward = Callable[..., object]


@dataclass(eq=False, slots=True)
class Captured:
    """A step that can be run again and again.

    Parameters
    ----------
    inputs : dict
        Static tensors to write before each run.
    kind : type
        Of the model's output.
    fields : dict
        Content of that output; its tensors are written by each run.
    run : callable
        Enqueue the step on the current stream, for the forward in progress and its request.
    """

    inputs: dict[str, torch.Tensor]
    kind: type[ModelOutput]
    fields: dict[str, object]
    run: Callable[[Step, Request], None]

    def output(self, request: Request) -> ModelOutput:
        """Copy of the output for the caller; the next run would overwrite the original."""
        fields = {name: x.clone() if isinstance(x, torch.Tensor) else x for name, x in self.fields.items()}
        return self.kind(**fields, **cache_argument(request.cache))


def capture(
    forward: Forward, now: Step, step: DeviceStep, request: Request, recorder: Callable[[], Recorder] | None
) -> Captured:
    """Make a runnable step out of one call of `forward`.

    Parameters
    ----------
    forward : callable
        The model's own forward.
    now : Step
        The forward that is in progress.
    recorder : callable or None
        Makes what records the step; None: each run calls `forward` again.

    Raises
    ------
    NotCapturableError
        If the model waits for the device around its attention, makes tensors whose shapes grow, or has layers that
        cannot attend on static buffers. The cache is as it was.
    """
    inputs = _static_inputs(request)
    try:
        _answer_beforehand(step)
        write_state(step, REHEARSAL_TICKET, request)
        if recorder is not None:
            return _recorded(forward, now, step, request, inputs, recorder)
        kind, fields = _parts(_call(forward, now, step, request, inputs))
    except (UnsupportedModelError, RuntimeError) as error:
        msg = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise NotCapturableError(msg) from error

    def run(now: Step, request: Request) -> None:
        captured.fields = _parts(_call(forward, now, step, request, inputs))[1]

    captured = Captured(inputs, kind, fields, run)
    return captured


def write_state(step: DeviceStep, ticket: int, request: Request) -> None:
    """Say which step this is and what its layers attend to; the step before must be over."""
    step.write_state(ticket, request.pages[0].near)
    if step.static is not None:
        step.static.write_bounds([x.layer for x in request.static], request.length, request.pads)


def _recorded(
    forward: Forward,
    now: Step,
    step: DeviceStep,
    request: Request,
    inputs: dict[str, torch.Tensor],
    recorder: Callable[[], Recorder],
) -> Captured:
    def call() -> object:
        return _call(forward, now, step, request, inputs)

    # Twice: workspaces of some libraries are allocated at the second call only.
    device, watch = step.shape.device, Watch()
    with _aside(device), watch:
        call()
    segments = Segments(watch.waiting)
    while True:
        with _aside(device):
            segments.rehearse(now, call)
        try:
            output, replay = segments.record(recorder(), call)
            break
        except RuntimeError as error:
            failed = failed_modules(error)
            if not failed or not segments.waiting.keys().isdisjoint(failed):
                raise
            segments.waiting.update(dict.fromkeys(failed, str(error).splitlines()[0]))
    kind, fields = _parts(output)
    return Captured(inputs, kind, fields, lambda _now, _request: replay())


@contextmanager
def _aside(device: torch.device) -> Iterator[None]:
    """Use another stream: what is rehearsed on the current one could not be captured."""
    if device.type != "cuda":
        yield
        return
    side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        yield
    torch.cuda.current_stream().wait_stream(side)


def _call(forward: Forward, now: Step, step: DeviceStep, request: Request, inputs: dict[str, torch.Tensor]) -> object:
    """Run the forward on static buffers; the cache is as before afterwards."""
    length, layers = request.length, list(request.cache.layers)
    stand_ins = [] if step.static is None else [StandIn(step.static, x, length) for x in request.static]
    now.device = step
    try:
        for x in stand_ins:
            request.cache.layers[x.layer_idx] = x
        output = forward(**inputs, **cache_argument(request.cache), **dict(request.options))
        for x in stand_ins:
            x.check_attended()
        return output
    finally:
        now.device = None
        request.cache.layers[:] = layers
        for layer in request.layers:
            layer.roll_back(length)


def _parts(output: object) -> tuple[type[ModelOutput], dict[str, object]]:
    if not isinstance(output, ModelOutput):
        msg = f"the model returns a {type(output).__name__}, not a ModelOutput"
        raise UnsupportedModelError(msg)
    # Without the cache: the graph must not keep it alive.
    return type(output), {name: x for name, x in output.items() if name not in CACHE_NAMES}


def _static_inputs(request: Request) -> dict[str, torch.Tensor]:
    """Copy the inputs; positions are always among them, or they would be constants of the graph."""
    ids = request.inputs["input_ids"]
    inputs = {name: x.clone() for name, x in request.inputs.items()}
    if "position_ids" not in inputs:
        inputs["position_ids"] = torch.full_like(ids, request.length, dtype=torch.long)
    return {name: inputs[name] for name in STATIC if name in inputs}


def _answer_beforehand(step: DeviceStep) -> None:
    """Let the waits of the rehearsal end at once, without pages."""
    if step.mailbox is not None:
        step.mailbox.answered.fill_(REHEARSAL_TICKET)
        step.mailbox.table.zero_()
