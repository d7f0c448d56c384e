"""`icecache bench`: how long a token takes, by context, budget, batch and method."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from icecache.bench.cells import Cell, Results, machine, measure
from icecache.bench.filled import Filled
from icecache.bench.methods import METHODS
from icecache.bench.shapes import SHAPES, random_model
from icecache.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BUDGETED = "ice"
_CELL = re.compile(
    r"(?P<method>[a-z0-9-]+)@(?P<context>[1-9]\d*)(?P<unit>[kK]?)(x(?P<batch>[1-9]\d*))?(:(?P<budget>\d+))?"
)
_LONG = ("cell", "machine", "steps_ms")
_FIGURES = ("tpot_ms_p50", "tpot_ms_p99", "search_us_layer", "fill_s", "tt2t_s", "first_ms")


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchOptions:
    """What `icecache bench` measures: every combination of the lists.

    Parameters
    ----------
    shape : str
        A key of `SHAPES`; weights are random.
    steps : int
        Tokens timed per cell.
    only : tuple of str
        ``METHOD@CONTEXT``, ``METHOD@CONTEXTxBATCH``, either with ``:BUDGET`` behind: these cells instead of all
        combinations. "ice@64kx4:1024" decodes 4 sequences of 65,536 tokens.
    parts : bool
        Profile a few more steps of each cell: time on the device by part.
    stop_after_s : float or None
        No cell is begun later than this many seconds after the start; the next run goes on.
    out : Path
        Folder for ``bench.jsonl`` (one line a cell, saved as it ends; a second run goes on), ``bench.txt`` and
        ``bench.png``.
    prompt : bool
        Compute real prompts: adds the time to the first token.

    Raises
    ------
    ConfigError
        If a value is out of range.
    """

    shape: str = "llama-3.1-8b"
    contexts: tuple[int, ...] = (4096, 36864, 65536, 131072)
    budgets: tuple[int, ...] = (256,)
    batches: tuple[int, ...] = (1,)
    methods: tuple[str, ...] = ("ice", "hf", "flash-graph")
    steps: int = 64
    seed: int = 0
    device: str = "cuda"
    prompt: bool = False
    only: tuple[str, ...] = ()
    parts: bool = False
    stop_after_s: float | None = None
    out: Path = Path("bench-out")

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            msg = f"shape must be one of {', '.join(SHAPES)}, got {self.shape!r}"
            raise ConfigError(msg)
        unknown = [m for m in self.methods if m not in METHODS]
        if unknown:
            msg = f"methods must be among {', '.join(METHODS)}, got {', '.join(unknown)}"
            raise ConfigError(msg)
        for name in ("contexts", "budgets", "batches"):
            values = getattr(self, name)
            if not values or min(values) < 1:
                msg = f"{name} must be positive numbers, got {values!r}"
                raise ConfigError(msg)
        if self.steps < 1:
            msg = f"steps must be >= 1, got {self.steps}"
            raise ConfigError(msg)
        self.cells()

    def cells(self) -> list[Cell]:
        """Cells of `only`, or every combination, baselines once per context and batch."""
        if self.only:
            return [self._named(text) for text in self.only]
        cells = []
        for context in self.contexts:
            for batch in self.batches:
                for method in self.methods:
                    budgets = self.budgets if method.startswith(_BUDGETED) else self.budgets[:1]
                    cells += [self._cell(context, batch, method, budget) for budget in budgets]
        return cells

    def _named(self, text: str) -> Cell:
        found = _CELL.fullmatch(text)
        if found is None or found["method"] not in METHODS:
            msg = f"only must be METHOD@CONTEXT, METHOD@CONTEXTxBATCH, either with :BUDGET behind, got {text!r}"
            raise ConfigError(msg)
        context = int(found["context"]) * (1024 if found["unit"] else 1)
        return self._cell(context, int(found["batch"] or 1), found["method"], int(found["budget"] or self.budgets[0]))

    def _cell(self, context: int, batch: int, method: str, budget: int) -> Cell:
        return Cell(
            shape=self.shape,
            method=method,
            context=context,
            budget=budget if method.startswith(_BUDGETED) else 0,
            batch=batch,
            steps=self.steps,
            seed=self.seed,
            prompt=self.prompt,
        )


def run_bench(options: BenchOptions) -> None:
    """Measure all cells, then write table and plot."""
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        msg = "device must be 'cpu' here: torch finds no CUDA device"
        raise ConfigError(msg)
    cells, began = options.cells(), time.monotonic()
    results = Results(options.out / "bench.jsonl", machine(device))
    model: PreTrainedModel | None = None
    filled = Filled()
    for cell in tqdm(cells, desc="cells", disable=not sys.stderr.isatty()):
        if results.find(cell) is not None:
            continue
        if options.stop_after_s is not None and time.monotonic() - began > options.stop_after_s:
            break
        if model is None:
            longest = max(cell.context for cell in cells) + options.steps + 64
            dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
            model = random_model(options.shape, device, dtype, max_tokens=longest, seed=options.seed)
        outcome = measure(model, cell, parts=options.parts, filled=filled)
        results.add(cell, outcome)
        sys.stdout.write(json.dumps(_short(results.lines[-1])) + "\n")
        sys.stdout.flush()
    lines = [line for cell in cells if (line := results.find(cell)) is not None]
    text = table(lines)
    (options.out / "bench.txt").write_text(text)
    sys.stdout.write(text)
    if lines:
        from icecache.bench.plot import plot

        plot(lines, options.out / "bench.png")


def _short(line: dict[str, object]) -> dict[str, object]:
    cell = line["cell"]
    assert isinstance(cell, dict)
    kept = {name: cell[name] for name in ("method", "context", "budget", "batch")}
    rest = {name: x for name, x in line.items() if name not in _LONG and x not in ("", 0)}
    return kept | {name: round(x, 3) if isinstance(x, float) else x for name, x in rest.items()}


def table(lines: Sequence[dict[str, object]]) -> str:
    """Text table of saved cells, one row each."""
    header = [
        "context",
        "batch",
        "method",
        "budget",
        "TPOT ms p50",
        "p99",
        "search us",
        "fill s",
        "TT2T s",
        "first ms",
        "device GiB",
        "host GiB",
    ]
    rows = [header]
    for line in lines:
        cell = line["cell"]
        assert isinstance(cell, dict)
        # Lines of earlier versions know less.
        values = (line.get(name, float("nan")) for name in _FIGURES)
        figures = ["-" if value != value else f"{value:.2f}" for value in values]
        gib = [f"{float(str(line[name])) / 2**30:.2f}" for name in ("kv_device_bytes", "kv_host_bytes")]
        budget = str(cell["budget"]) if cell["budget"] else "all"
        rows.append([str(cell["context"]), str(cell["batch"]), str(cell["method"]), budget, *figures, *gib])
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    text = "\n".join("  ".join(x.rjust(w) for x, w in zip(row, widths, strict=True)) for row in rows)
    if lines:
        first = lines[0]
        cell = first["cell"]
        assert isinstance(cell, dict)
        text += f"\n\n{cell['shape']}, random weights, {cell['steps']} tokens a cell, seed {cell['seed']}; "
        text += ", ".join(f"{k} {v}" for k, v in dict(first["machine"]).items())  # type: ignore[call-overload]
    return text + "\n"
