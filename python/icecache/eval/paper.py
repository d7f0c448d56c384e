"""`icecache eval paper`: the runs behind the paper's tables for a model, and these tables from what has run.

The paper: IceCache, arXiv 2604.10539. Settings are those of its public scripts (yuzhenmao/IceCache, 44346b0): 2 dense
layers, sink and window of two pages each inside the budget, question in the dense prefill (setup A).
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Final

from icecache.errors import ConfigError
from icecache.eval.folder import MANIFEST
from icecache.eval.markdown import ABSENT, number, points, table
from icecache.eval.record import SETUPS
from icecache.eval.results import Cell, Results, budget_of
from icecache.eval.suites import SUITES

BUDGETS: Final = (64, 128, 256)
POLICIES: Final = (
    *("icecache", "icecache-reuse", "icecache-paper"),
    *("snapkv", "quest", "arkvale", "pqcache", "omnikv", "magicpig"),
)
PUBLISHED: Final = (
    "Published for the paper's own code: 99 % of full at 256 tokens on LongBench, 97 % at 64 (abstracts)."
)


@dataclass(frozen=True, slots=True)
class PaperModel:
    """A model of the paper.

    Parameters
    ----------
    checkpoint : str
        On the hub.
    longbench_tokens : int
        Where LongBench's prompts are cut: as in the paper's script, or lower where it leaves no room for the answer
        (131,072 for Llama, 32,768 for Mistral).
    ruler_tokens : tuple of int
        Lengths that it can read as it stands on the hub.
    note : str
        What has to be set up first; "": nothing.
    """

    checkpoint: str
    longbench_tokens: int
    ruler_tokens: tuple[int, ...]
    note: str = ""


MODELS: Final = (
    PaperModel("meta-llama/Llama-3.1-8B-Instruct", 130_000, (32_768, 65_536, 131_072)),
    PaperModel(
        "mistralai/Mistral-7B-Instruct-v0.2",
        32_000,
        (8192, 16_384, 32_768),
        "the paper's script writes [INST]...[/INST] without blanks; set such a chat template for its prompts",
    ),
    PaperModel(
        "Qwen/Qwen3-32B",
        128_000,
        (8192, 16_384, 32_768),
        "prompts beyond 40,960 tokens need YaRN (factor 4 of 32,768) in the model's config; the paper's script turns "
        "thinking off, so use a chat template with enable_thinking=False",
    ),
    PaperModel(
        "lmsys/longchat-7b-v1.5-32k",
        32_000,
        (8192, 16_384, 32_768),
        "the tokenizer has no chat template: set Vicuna's, which the paper's script writes",
    ),
)


@dataclass(frozen=True, slots=True)
class Part:
    """One table: its folder, its suite and the arguments that the others do not share."""

    name: str
    title: str
    suite: str
    arguments: tuple[str, ...]


def find_model(name: str) -> PaperModel:
    """Model by checkpoint, folder name, or any part of these that only one has.

    Raises
    ------
    ConfigError
        If none or several fit.
    """
    wanted = Path(name).name.lower()
    found = [model for model in MODELS if wanted in model.checkpoint.lower()]
    if len(found) != 1:
        msg = f"--model must be one of {', '.join(m.checkpoint for m in MODELS)}, or a part of its name, got {name!r}"
        raise ConfigError(msg)
    return found[0]


def parts_of(model: PaperModel) -> tuple[Part, ...]:
    """Say which tables there are, and how they are run."""
    ruler = ",".join(map(str, model.ruler_tokens))
    return (
        Part(
            "longbench",
            "LongBench, 16 English sets",
            "longbench-authors",
            ("--lengths", str(model.longbench_tokens)),
        ),
        Part("passkey", "Passkey, 10k, 20k and 30k tokens, 20 depths", "passkey", ()),
        Part("gsm8k", "GSM8K, chain of thought, the paper's prompt", "gsm8k-authors", ()),
        Part("ruler", "RULER", "ruler", ("--lengths", ruler, "--limit", "100")),
    )


def command(model: str, part: Part, out: Path, data_dir: Path) -> str:
    """Write the command of a part, to be typed into a shell."""
    words = ["icecache", "eval", "run", "--model", model, "--out", str(out / part.name), "--suite", part.suite]
    words += ["--data-dir", str(data_dir), *part.arguments, "--setup", ",".join(SETUPS), "--device", "cuda"]
    words += ["--policies", ",".join(POLICIES), "--budgets", ",".join(map(str, BUDGETS)), "--resume"]
    return shlex.join(words)


def paper(model: str, out: Path, data_dir: Path) -> Iterator[str]:
    """Say how each table is made, and show those whose runs are in `out`.

    Parameters
    ----------
    model : str
        As `find_model` takes it; a folder or hub id is what the commands get.
    out : Path
        Folder of the runs, one folder a part.
    data_dir : Path
        Of the official data.

    Yields
    ------
    str
        Paragraphs of markdown.

    Raises
    ------
    ConfigError
        If the model is none of the paper's.
    DataError
        If a run's folder is broken.
    """
    known = find_model(model)
    place = model if Path(model).is_dir() else known.checkpoint
    yield f"# The paper's tables: {known.checkpoint}"
    if known.note:
        yield f"First: {known.note}."
    yield PUBLISHED
    for part in parts_of(known):
        yield f"## {part.title}"
        yield f"    {command(place, part, out, data_dir)}"
        folder = out / part.name
        if (folder / MANIFEST).exists():
            yield from paper_tables(Results.read(folder), part.suite)
        else:
            yield "Not run yet."


def paper_tables(results: Results, suite: str) -> Iterator[str]:
    """Write arms x tasks, a table a setup and length, as the paper prints them: budgets together, averages last.

    The average is over all tasks, whether they discriminate or not, because the paper's is; only arms that ran on all
    have one. `icecache eval report` has the averages and intervals that claims should rest on.
    """
    order = {task.name: place for place, task in enumerate(SUITES[suite].tasks)}
    for setup, length in results.groups:
        cells = sorted(results.of_group(setup, length), key=lambda cell: order.get(cell.task, len(order)))
        arms = sorted(results.arms, key=lambda arm: (budget_of(arm) or 0, results.arms.index(arm)))
        rows = [paper_row(results, cells, arm) for arm in arms if any(results.records(c, arm) for c in cells)]
        name = f"Setup {setup}" + (f", {length:,} tokens" if length else "")
        yield f"### {name}"
        yield table(["arm", *(cell.task for cell in cells), "average", "% of full"], rows)


def paper_row(results: Results, cells: list[Cell], arm: str) -> list[str]:
    """Write the cells of one arm."""
    scores = [results.score(cell, arm) for cell in cells]
    full = [results.score(cell, "full") for cell in cells]
    average = fmean(s for s in scores if s is not None) if None not in scores else None
    base = fmean(s for s in full if s is not None) if None not in full else None
    share = number(100 * average / base, 1) if average is not None and base else ABSENT
    return [arm, *map(points, scores), points(average), share]
