"""Cells of the speed table: measured one by one, each saved as it ends, so that several runs can finish a table."""

from __future__ import annotations

import gc
import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from icecache.bench.filled import Filled
from icecache.bench.methods import Decoding, start
from icecache.bench.parts import PROFILED_STEPS
from icecache.bench.parts import device_parts as _device_parts
from icecache.bench.shapes import SHAPES
from icecache.bench.synthetic import Content

if TYPE_CHECKING:
    from transformers import PreTrainedModel


WARM_UP_STEPS = 4
"""The first step captures the graph or loads kernels, the others fill allocators."""
SLOW_STEPS = {"hf-offload": 8}
"""Most steps of methods that copy the whole context in each: 2 s at 300k tokens of an 8B model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """What is measured.

    Parameters
    ----------
    context : int
        Tokens in the cache when decoding starts.
    steps : int
        Tokens timed, after a few more that are not; fewer of `SLOW_STEPS`.
    prompt : bool
        Compute a prompt of random tokens instead of filling the cache with made-up keys and values.
    """

    shape: str
    method: str
    context: int
    budget: int
    batch: int
    steps: int
    seed: int
    prompt: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came out; `error` is empty, or says why there are no figures.

    Parameters
    ----------
    tpot_ms_p50, tpot_ms_p99, tpot_ms_mean : float
        Milliseconds a token (of the whole batch), host clock, the device waited for after each token.
    steps_ms : list of float
        Each of these times.
    first_ms : float
        The first step: capture, or loading of kernels.
    fill_s : float
        Writing the cache: the build of the index for ours, and with `prompt` the time to the first token, after a short
        prompt and two tokens that are not timed.
    adopted : bool
        Whether the pages are those of an earlier cell, so that `fill_s` says nothing.
    tt2t_s : float
        With `prompt`: time to the second token.
    kv_device_bytes : int
        Most bytes on the device beyond the weights while decoding, workspaces included.
    prefill_peak_bytes : int
        Most bytes on the device beyond the weights until the cache is filled; of a prompt, activations included.
    kv_host_bytes : int
        Keys and values on the host.
    """

    tpot_ms_p50: float = float("nan")
    tpot_ms_p99: float = float("nan")
    tpot_ms_mean: float = float("nan")
    steps_ms: list[float] = field(default_factory=list)
    first_ms: float = float("nan")
    fill_s: float = float("nan")
    adopted: bool = False
    tt2t_s: float = float("nan")
    kv_device_bytes: int = 0
    prefill_peak_bytes: int = 0
    kv_host_bytes: int = 0
    search_us_layer: float = float("nan")
    """Mean time from a request of a layer to its answer, microseconds."""
    insert_wait_ms: float = 0.0
    """How long the timed steps waited for inserts that were late, in all."""
    attended: float = float("nan")
    """Mean tokens attended per KV head and step."""
    fill_parts_ms: dict[str, float] = field(default_factory=dict)
    """Of ours, on the host: copies from the device, and packing; with a prompt both run beside the GPU."""
    device_parts_us: dict[str, float] = field(default_factory=dict)
    """Where a step's time goes on the device, if asked for; see :mod:`icecache.bench.parts`."""
    error: str = ""


class Results:
    """Cells and outcomes in a file of JSON lines; a cell that is there is not measured again.

    Parameters
    ----------
    path : Path
        Made with its folders if missing.
    machine : dict
        Hardware and versions, saved with each line.
    """

    def __init__(self, path: Path, machine: dict[str, str]) -> None:
        self.path, self.machine = path, machine
        path.parent.mkdir(parents=True, exist_ok=True)
        self.lines: list[dict[str, object]] = []
        if path.exists():
            self.lines = [json.loads(line) for line in path.read_text().splitlines() if line]

    def find(self, cell: Cell) -> dict[str, object] | None:
        """Outcome of a cell measured without an error earlier."""
        wanted = asdict(cell)
        found = (line for line in self.lines if line["cell"] == wanted and not line["error"])
        return next(found, None)

    def add(self, cell: Cell, outcome: Outcome) -> None:
        """Save one more line at once."""
        line = {"cell": asdict(cell), **asdict(outcome), "machine": self.machine}
        self.lines.append(line)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def machine(device: torch.device) -> dict[str, str]:
    """Hardware and versions."""
    import os
    import platform

    import transformers

    from icecache import _core

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "CPU"
    return {
        "device": name,
        "cores": str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()),
        "simd": _core.simd(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def measure(model: PreTrainedModel, cell: Cell, *, parts: bool = False, filled: Filled | None = None) -> Outcome:
    """Measure one cell; running out of memory is an outcome, not an end.

    Parameters
    ----------
    parts : bool, default=False
        Measure where a step's time goes, too.
    filled : Filled or None
        For cells that follow one another and differ in budget alone.
    """
    device, filled = model.device, filled or Filled()
    try:
        return _measure(model, cell, device, filled, parts=parts)
    except (torch.OutOfMemoryError, MemoryError) as error:
        filled.drop()
        return Outcome(error=f"out of memory: {str(error).splitlines()[0]}")
    finally:
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _measure(model: PreTrainedModel, cell: Cell, device: torch.device, filled: Filled, *, parts: bool) -> Outcome:
    shape = SHAPES[cell.shape]
    content = Content(
        n_layers=shape.num_hidden_layers,
        n_rows=cell.batch,
        n_kv_heads=shape.num_key_value_heads,
        n_tokens=cell.context,
        head_dim=shape.head_dim,
        dtype=model.dtype,
        device=device,
        seed=cell.seed,
    )
    on_device = _used(device) - filled.device_bytes()
    n_steps = min(cell.steps, SLOW_STEPS.get(cell.method, cell.steps))
    with torch.inference_mode():
        prompt = None
        if cell.prompt:
            generator = torch.Generator(device).manual_seed(cell.seed)
            size = (cell.batch, cell.context)
            prompt = torch.randint(3, shape.vocab_size, size, generator=generator, device=device)
        n_new = n_steps + WARM_UP_STEPS + PROFILED_STEPS + 1
        _wait(device)
        began = time.perf_counter()
        decoding = start(cell.method, model, content, budget=cell.budget, n_new=n_new, prompt=prompt, filled=filled)
        try:
            started_s = _seconds_since(began, device)
            decoding.warm_up()
            _wait(device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            began = time.perf_counter()
            adopted = decoding.fill()
            fill_s = started_s + _seconds_since(began, device)
            host_bytes = _host_bytes(decoding, cell.method, content)
            on_device += filled.device_bytes()
            filling = _peak(device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            warm = [_timed(decoding.step) for _ in range(WARM_UP_STEPS)]
            fill_parts: dict[str, float] = {}
            if decoding.runtime is not None:
                spent = decoding.runtime.stats().ms  # ends the step, too, so that it is not counted below
                fill_parts = {name: spent[name] for name in ("prefill_offload", "index_build")}
                decoding.runtime.reset_stats()
            times = [_timed(decoding.step) for _ in range(n_steps)]
            peak = _peak(device)
            stats = None if decoding.runtime is None else decoding.runtime.stats()
            device_parts = _device_parts(decoding.step) if parts and device.type == "cuda" else {}
            n_searches = 1 if decoding.runtime is None else len(decoding.runtime.layer_groups)
        finally:
            decoding.close()
    nan = float("nan")
    return Outcome(
        tpot_ms_p50=float(np.median(times)),
        tpot_ms_p99=float(np.percentile(times, 99)),
        tpot_ms_mean=float(np.mean(times)),
        steps_ms=[round(ms, 3) for ms in times],
        first_ms=warm[0],
        fill_s=fill_s,
        adopted=adopted,
        tt2t_s=fill_s + warm[0] / 1e3 if cell.prompt else nan,
        kv_device_bytes=max(peak - on_device, 0),
        prefill_peak_bytes=max(filling - on_device, 0),
        kv_host_bytes=host_bytes,
        fill_parts_ms=fill_parts,
        device_parts_us=device_parts,
        search_us_layer=nan if stats is None else stats.ms["search"] * 1e3 / max(stats.steps, 1) / n_searches,
        insert_wait_ms=0.0 if stats is None else stats.ms["insert_wait"],
        attended=nan if stats is None else stats.attended_mean,
    )


def _host_bytes(decoding: Decoding, method: str, content: Content) -> int:
    """Bytes of keys and values on the host."""
    if decoding.runtime is not None:
        return decoding.runtime.stats().host_bytes
    n = 2 * content.n_layers * content.n_rows * content.n_kv_heads * content.n_tokens * content.head_dim
    return n * content.dtype.itemsize if method == "hf-offload" else 0


def _seconds_since(began: float, device: torch.device) -> float:
    _wait(device)
    return time.perf_counter() - began


def _timed(step: object) -> float:
    began = time.perf_counter()
    step()[0, 0].item()  # type: ignore[operator]  # sync: a token is done when its id is on the host
    return (time.perf_counter() - began) * 1e3


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def _used(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0
