"""The numbers behind the figures of a report: which arms can stand in one picture, and where.

Dimension key: D bins of depth, L lengths.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Final

import numpy as np

from icecache.eval import stats
from icecache.eval.record import Record, Setup
from icecache.eval.results import Cell, Results, budget_of

Group = tuple[Setup, int]
DEPTH_BINS: Final = 10
FEWEST: Final = 20
"""Samples of a bin by generated tokens: fewer say nothing."""


@dataclass(frozen=True, slots=True)
class Shared:
    """Tasks on which a set of arms can be compared.

    Parameters
    ----------
    tasks : tuple of str
        All arms ran on all of them, in every group.
    arms : tuple of str
        Full attention first.
    left_out : tuple of str
        Arms that did not run on all of the tasks.
    """

    tasks: tuple[str, ...]
    arms: tuple[str, ...]
    left_out: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Heat:
    """Mean scores of one arm on one task by depth and length.

    Parameters
    ----------
    lengths : tuple of int
        L nominal tokens, ascending.
    scores : numpy.ndarray
        float64 `(D, L)`, the beginning of the context first; NaN where no sample lies.
    """

    lengths: tuple[int, ...]
    scores: stats.Floats


def shared(results: Results, groups: Sequence[Group], arms: Sequence[str]) -> Shared | None:
    """Choose tasks that can be averaged in one picture.

    An average over other tasks is another number, so an arm is either drawn on all chosen tasks or left out. Chosen
    is the set that some arm ran on for which tasks times arms is largest. Tasks that are known not to discriminate at
    a budget of the arms are left out, as in the tables.

    Parameters
    ----------
    results : Results
        The run.
    groups : sequence of (setup, length)
        An arm has to have run on a task in each of them.
    arms : sequence of str
        Candidates.

    Returns
    -------
    Shared or None
        None: full attention and another arm have no task in common.
    """
    budgets = {budget_of(arm) for arm in arms} - {None}
    usable = [
        task
        for task in dict.fromkeys(cell.task for cell in results.cells)
        if not any(results.discriminates(Cell(*group, task), b) is False for group in groups for b in budgets)
    ]
    ran = {arm: frozenset(t for t in usable if _ran(results, groups, t, arm)) for arm in dict.fromkeys(["full", *arms])}
    others = [arm for arm in ran if arm != "full"]
    sets = {tasks for arm in others if (tasks := ran[arm] & ran["full"])}
    if not sets:
        return None

    def worth(tasks: frozenset[str]) -> tuple[int, int, list[str]]:
        return len(tasks) * sum(tasks <= ran[arm] for arm in others), len(tasks), sorted(tasks)

    best = max(sets, key=worth)
    drawn = [arm for arm in ran if best <= ran[arm]]
    left_out = tuple(arm for arm in others if arm not in drawn)
    return Shared(tuple(t for t in usable if t in best), tuple(drawn), left_out)


def _ran(results: Results, groups: Iterable[Group], task: str, arm: str) -> bool:
    return all(results.records(Cell(*group, task), arm) for group in groups)


def macro(results: Results, group: Group, tasks: Iterable[str], arm: str) -> stats.Interval:
    """Mean of an arm's scores over tasks, with its interval; every task must have run."""
    rows = [[r.score for r in results.records(Cell(*group, task), arm).values()] for task in tasks]
    return stats.mean_interval(rows)


def loaded(results: Results, group: Group, tasks: Iterable[str], arm: str) -> float | None:
    """Tokens that an arm loads per KV head and step, mean over samples."""
    return results.mean([Cell(*group, task) for task in tasks], arm, "loaded")


def by_policy(arms: Iterable[str]) -> dict[str, list[str]]:
    """Arms with a budget by policy, budgets ascending."""
    found: dict[str, list[str]] = {}
    for arm in sorted((arm for arm in arms if budget_of(arm) is not None), key=lambda arm: budget_of(arm) or 0):
        found.setdefault(arm.partition("@")[0], []).append(arm)
    return found


@dataclass(frozen=True, slots=True)
class ByGenerated:
    """Mean scores by how many tokens full attention's answer has: the same samples for every arm.

    Parameters
    ----------
    edges : tuple of (int, int)
        Fewest and most generated tokens of each of E bins.
    counts : tuple of int
        Samples in each.
    tasks : tuple of str
        Where they come from.
    scores : dict of str to tuple of Interval
        E of them for each arm.
    """

    edges: tuple[tuple[int, int], ...]
    counts: tuple[int, ...]
    tasks: tuple[str, ...]
    scores: dict[str, tuple[stats.Interval, ...]]


def by_generated(results: Results, groups: Sequence[Group], arms: Sequence[str]) -> ByGenerated | None:
    """Sort samples by the length of full attention's answer, in powers of two; None: one bin holds them all.

    Parameters
    ----------
    results : Results
        The run.
    groups : sequence of (setup, length)
        Whose samples to take.
    arms : sequence of str
        To draw; those that lack samples of the tasks that most of them ran on are left out.
    """
    chosen = shared(results, groups, arms)
    if chosen is None:
        return None
    bins: dict[int, list[tuple[Cell, str]]] = {}
    lengths: dict[int, list[int]] = {}
    for cell in (Cell(*group, task) for group in groups for task in chosen.tasks):
        both = [results.records(cell, arm).keys() for arm in chosen.arms]
        for name, record in results.records(cell, "full").items():
            if all(name in keys for keys in both):
                place = max(record.n_generated, 1).bit_length()
                bins.setdefault(place, []).append((cell, name))
                lengths.setdefault(place, []).append(record.n_generated)
    places = sorted(place for place, found in bins.items() if len(found) >= FEWEST)
    if len(places) < 2:
        return None
    scores = {
        arm: tuple(stats.mean_interval([[results.records(c, arm)[i].score for c, i in bins[p]]]) for p in places)
        for arm in chosen.arms
    }
    return ByGenerated(
        tuple((min(lengths[p]), max(lengths[p])) for p in places),
        tuple(len(bins[p]) for p in places),
        chosen.tasks,
        scores,
    )


def deep_tasks(results: Results, setup: Setup) -> list[str]:
    """Tasks of a setup whose samples have a depth, at two lengths or more."""
    lengths: dict[str, set[int]] = {}
    for cell in results.cells:
        if cell.setup == setup and cell.length and any(map(depth_of, results.records(cell, "full").values())):
            lengths.setdefault(cell.task, set()).add(cell.length)
    return [task for task, found in lengths.items() if len(found) > 1]


def depth_of(record: Record) -> float | None:
    """Where the needle lies: above 0, the beginning, to 1; None: the sample has none."""
    depth = record.meta.get("depth")
    # A depth of exactly 0 is a depth: the smallest positive float stands for it, so that None alone is false.
    return max(float(depth), 5e-324) if isinstance(depth, int | float) else None


def heat(results: Results, setup: Setup, task: str, arm: str) -> Heat | None:
    """Average an arm's scores by depth and length; None: it did not run on the task."""
    cells = [cell for cell in results.cells if (cell.setup, cell.task) == (setup, task)]
    found: dict[tuple[int, int], list[float]] = {}
    for cell in cells:
        for record in results.records(cell, arm).values():
            if (depth := depth_of(record)) is not None:
                row = min(int(DEPTH_BINS * depth), DEPTH_BINS - 1)
                found.setdefault((row, cell.length), []).append(record.score)
    if not found:
        return None
    lengths = tuple(cell.length for cell in cells)
    scores = np.full((DEPTH_BINS, len(lengths)), np.nan)
    for (row, length), values in found.items():
        scores[row, lengths.index(length)] = fmean(values)
    return Heat(lengths, scores)
