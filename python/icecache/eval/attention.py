"""`icecache eval attention`: what policies keep of the model's own attention, by layer and KV head.

Every policy is fed the same tokens: context (dense), question, and the answer that full attention gives.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Final

import torch

from icecache.errors import ConfigError, DataError
from icecache.eval.arms import DENSE, dense_layers
from icecache.eval.folder import check_folder
from icecache.eval.greedy import answer_greedily, step
from icecache.eval.heads import MEASURES, HeadRow, known_mean
from icecache.eval.machine import describe_run, this_command
from icecache.eval.markdown import number, table
from icecache.eval.model import check_device, load_model, open_model
from icecache.eval.options import SHIPPED, EvalOptions
from icecache.eval.plan import make_cells
from icecache.eval.prefill import attend, plain_copy, prefill, what_to_note
from icecache.eval.progress import Progress
from icecache.eval.run import identity
from icecache.eval.suites import choose_tasks
from icecache.eval.task import DataDir
from icecache.eval.watch import LayerStep, Watch

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

SAMPLES: Final = 2


def run_attention(options: EvalOptions, write: Callable[[str], None]) -> list[HeadRow]:
    """Measure, print the tables, and save `attention.json` and `attention.md` in the folder of the options.

    Parameters
    ----------
    options : EvalOptions
        Policies, budgets, lengths, tasks; controls and setup are not used.
    write : callable
        Takes lines.

    Raises
    ------
    ConfigError, DataError
        Before the model is loaded, for everything that can be known by then.
    """
    arms = options.arms()
    if dense := [arm.name for arm in arms if arm.policy in DENSE]:
        msg = f"--policies must name policies with a budget, got {', '.join(dense)}"
        raise ConfigError(msg)
    # Needle tasks are made for the shipped model; whoever names some of them for another one means them.
    shipped = options.model == SHIPPED or bool(options.tasks)
    tasks = choose_tasks(options.suite if options.suite != ("needle",) or shipped else ("passkey",), options.tasks)
    check_device(options.device)
    check_folder(options.out, resume=True)
    source = open_model(options.model)
    cells = make_cells(
        tasks,
        options.lengths,
        limit=options.limit or SAMPLES,
        seed=options.seed,
        data=None if options.data_dir is None else DataDir(options.data_dir),
        tokenizer=source.tokenizer,
        model_limit=source.limit,
    )
    model = load_model(source, options.device, options.dtype_name())
    found: dict[str, list[LayerStep]] = {arm.name: [] for arm in arms}
    # Graphs show no single step; eager steps read the same.
    base = replace(options.base_config(), decode="eager")
    layers = {arm: replace(base, dense_layers=dense_layers(arm, options.dense_layers, source.n_layers)) for arm in arms}
    work = float(sum(prompt.n_most for cell in cells for prompt in cell.prompts))
    progress = Progress({arm.name: work for arm in arms}, write)
    for cell in cells:
        for prompt in cell.prompts:
            write(f"{cell.label}, sample {prompt.sample.id}")
            prefilled = prefill(model, [prompt], "B", notes=what_to_note(arms, base))
            answers, _ = answer_greedily(
                model, source.tokenizer, [prompt], plain_copy(prefilled.cache, model), prefilled.setup
            )
            tokens = prompt.question + answers[0].tokens[:-1]
            for arm in arms:
                began = time.perf_counter()
                with attend(model, arm, layers[arm], prefilled) as session:
                    assert session.runtime is not None
                    Watch(session.runtime, session.cache, prefilled.cache, found[arm.name].append)
                    feed(model, tokens, session.cache)
                progress.add(arm.name, prompt.n_most, time.perf_counter() - began, f"{cell.label}, {arm.name}")
    rows = [row for name, steps in found.items() for row in summarise(name, steps)]
    if not rows:
        msg = "no layer read pages or a choice of tokens: every layer is dense, or samples are shorter than dense_below"
        raise DataError(msg)
    if silent := [name for name, steps in found.items() if not steps]:
        write(f"not measured, because every layer was dense: {', '.join(silent)}")
    header = {**identity(options, source), **asdict(describe_run(this_command(), options.device))}
    header |= {"tasks": [cell.label for cell in cells], "samples": sum(len(cell.prompts) for cell in cells)}
    save(options.out, header, rows)
    write(f"\n{overview(rows)}\n\nby layer and head: {options.out / 'attention.md'}")
    return rows


@torch.inference_mode()
def feed(model: PreTrainedModel, tokens: Sequence[int], cache: Cache) -> None:
    """Give tokens one by one."""
    for token in tokens:
        step(model, torch.tensor([[token]], device=model.device), cache)


def summarise(arm: str, steps: Iterable[LayerStep]) -> list[HeadRow]:
    """Average over steps, by layer and KV head."""
    by_layer: dict[int, list[LayerStep]] = {}
    for one in steps:
        by_layer.setdefault(one.layer, []).append(one)
    rows = []
    for layer, found in sorted(by_layer.items()):
        measured = torch.stack([one.heads for one in found]).cpu()  # (steps, H, MEASURES)
        calibration = known_mean(one.calibration for one in found)
        mass, error = (measured[..., MEASURES.index(name)] for name in ("mass", "error"))
        low, high = mass.quantile(0.05, 0), error.quantile(0.95, 0)
        for h in range(measured.shape[1]):
            means = dict(zip(MEASURES, map(known_mean, measured[:, h].T.tolist()), strict=True))
            rows.append(HeadRow(arm, layer, h, len(found), means, float(low[h]), float(high[h]), calibration))
    return rows


HEADER: Final = (
    *("attended", "mass", "p5", "error", "p95"),
    *("top 16", "top 64", "regret", "packing", "search", "estimate"),
)


def cells_of(rows: Sequence[HeadRow]) -> list[str]:
    """Cells of a line of a table, means over heads."""
    means = {name: known_mean(row.means[name] for row in rows) for name in MEASURES}
    return [
        number(means["attended"], 1),
        number(means["mass"], 3),
        number(fmean(row.mass_p5 for row in rows), 3),
        number(means["error"], 3),
        number(fmean(row.error_p95 for row in rows), 3),
        *(number(means[name], 3) for name in ("recall_16", "recall_64")),
        *(number(means[name], 4) for name in ("regret", "packing", "search")),
        number(known_mean(row.calibration for row in rows), 4),
    ]


def overview(rows: Sequence[HeadRow]) -> str:
    """Write a table of the arms, means over layers and heads."""
    arms = dict.fromkeys(row.arm for row in rows)
    return table(["arm", *HEADER], [[arm, *cells_of([r for r in rows if r.arm == arm])] for arm in arms])


EXPLAINED: Final = (
    "Means over query heads and decode steps, in layers that are not dense. *mass*: share of the true softmax that was "
    "attended (p5: 5th percentile over the steps of a head). *error*: of the attention output, relative to exact (p95 "
    "likewise). *top 16, 64*: share of the tokens with the largest logits that were attended. *regret*: mass of the "
    "best tokens of each query head minus that of as many attended ones. Where whole pages are chosen for a KV head: "
    "*packing*, the best tokens of the KV head minus the best pages, as many tokens; *search*, the best pages minus "
    "the chosen ones, as many pages. *estimate*: |estimated - true| mass, a layer and step."
)


def as_markdown(header: dict[str, object], rows: Sequence[HeadRow]) -> str:
    """Write the report: arms, then layers, then KV heads."""
    layers = dict.fromkeys((row.arm, row.layer) for row in rows)
    by_layer = [[a, str(n), *cells_of([r for r in rows if (r.arm, r.layer) == (a, n)])] for a, n in layers]
    by_head = [[row.arm, str(row.layer), str(row.head), *cells_of([row])] for row in rows]
    facts = ", ".join(f"{key} {value}" for key, value in header.items())
    parts = [
        "# Attention under a budget",
        EXPLAINED,
        overview(rows),
        "## By layer",
        table(["arm", "layer", *HEADER], by_layer),
        "## By KV head",
        table(["arm", "layer", "head", *HEADER], by_head),
        "## How it was made",
        f"{facts}.",
    ]
    return "\n\n".join(parts) + "\n"


def save(folder: Path, header: dict[str, object], rows: Sequence[HeadRow]) -> None:
    """Write `attention.json` and `attention.md`."""
    folder.mkdir(parents=True, exist_ok=True)
    data = {**header, "heads": [asdict(row) for row in rows]}
    (folder / "attention.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    (folder / "attention.md").write_text(as_markdown(header, rows), encoding="utf-8")
