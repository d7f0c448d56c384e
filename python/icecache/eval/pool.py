"""`icecache eval pool`: every arm against full attention over several models, each task of each model a stratum."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from icecache.errors import ConfigError, DataError
from icecache.eval import stats
from icecache.eval.markdown import ABSENT, points, share, signed, table
from icecache.eval.record import Setup
from icecache.eval.report import OURS, claim
from icecache.eval.results import Pairs, Results, arm_order, budget_of

ALL: Final = "full"


def pool(folders: Sequence[Path], arms: Sequence[str] = ()) -> str:
    """Write a table for each setup and length that the runs have.

    Parameters
    ----------
    folders : sequence of Path
        Runs of different models.
    arms : sequence of str, default=()
        Such as "icecache@256"; empty: every arm of any run.

    Returns
    -------
    str
        Markdown.

    Raises
    ------
    ConfigError
        If two runs are of one model, or an arm ran nowhere.
    DataError
        If a folder holds no run, or nothing can be paired with full attention.
    """
    runs = [Results.read(folder) for folder in folders]
    names = [_model(run, folder) for run, folder in zip(runs, folders, strict=True)]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        msg = f"pool needs one folder a model, got several of {', '.join(twice)}: put them together with eval merge"
        raise ConfigError(msg)
    known = sorted({arm for run in runs for arm in run.arms}, key=arm_order)
    if unknown := [arm for arm in arms if arm not in known]:
        msg = f"--arms must be among {', '.join(known)}, got {', '.join(unknown)}"
        raise ConfigError(msg)
    parts = [
        part
        for setup, length in dict.fromkeys(group for run in runs for group in run.groups)
        for part in _section(runs, setup, length, [arm for arm in arms or known if arm != ALL])
    ]
    if not parts:
        msg = f"nothing can be paired with full attention in {', '.join(map(str, folders))}"
        raise DataError(msg)
    return "\n\n".join([f"# {', '.join(names)} together", _EXPLAINED, *parts]) + "\n"


_EXPLAINED: Final = (
    "Means over the tasks of every model that discriminate at the budget, each task of each model one stratum of equal "
    "weight; pairs are resampled within strata (10,000 times), intervals are 95 %. *claim* is what the lower bound of "
    "the ratio to full attention shows. *minus arm*: our smallest budget minus this arm, on strata that discriminate "
    "at both budgets."
)


def _model(run: Results, folder: Path) -> str:
    return str(run.manifest.identity["model"]) if run.manifest else folder.name


def _section(runs: Sequence[Results], setup: Setup, length: int, arms: Sequence[str]) -> Iterator[str]:
    ours = next((arm for arm in sorted(arms, key=arm_order) if arm.partition("@")[0] == OURS), None)
    rows = [row for arm in arms if (row := _row(runs, setup, length, arm, ours)) is not None]
    if rows:
        name = f"Setup {setup}" + (f", {length:,} tokens" if length else "")
        header = [
            "arm",
            "models",
            "tasks",
            "n",
            "full",
            "arm's",
            "Δ full",
            "ratio",
            "claim",
            "only full / only arm right",
        ]
        yield f"## {name}\n\n{table([*header, f'{ours or OURS} minus arm'], rows)}"


def _row(runs: Sequence[Results], setup: Setup, length: int, arm: str, ours: str | None) -> list[str] | None:
    by_run = [strata(run, setup, length, ALL, arm) for run in runs]
    found = [pairs for of_run in by_run for pairs in of_run]
    if not found:
        return None
    first, second = [p.first for p in found], [p.second for p in found]
    counts = [stats.mcnemar(p.first, p.second) for p in found]
    ratio = stats.macro_ratio(first, second)
    lead = ABSENT
    if ours is not None and arm != ours and budget_of(arm) is not None:
        against = [pairs for run in runs for pairs in strata(run, setup, length, arm, ours)]
        if against:
            lead = signed(stats.macro_difference([p.first for p in against], [p.second for p in against]))
    return [
        arm,
        str(sum(bool(of_run) for of_run in by_run)),
        str(len(found)),
        str(sum(len(p.ids) for p in found)),
        points(sum(float(one.mean()) for one in first) / len(first)),
        points(sum(float(two.mean()) for two in second) / len(second)),
        signed(stats.macro_difference(first, second)),
        share(ratio),
        claim(ratio),
        f"{sum(c.only_first for c in counts)} / {sum(c.only_second for c in counts)}",
        lead,
    ]


def strata(run: Results, setup: Setup, length: int, first: str, second: str) -> list[Pairs]:
    """Pairs of two arms, one entry a task that counts in their average (see `Results.averaged`)."""
    cells = run.averaged(setup, length, [ALL, first, second])
    return [pairs for cell in cells if (pairs := run.pairs(cell, first, second)) is not None]
