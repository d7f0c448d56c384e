"""The table at equal loads: what rivals score when they load as many tokens per KV head as an arm of ours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from icecache.eval import stats
from icecache.eval.curves import by_policy, loaded
from icecache.eval.markdown import ABSENT, number, points, signed, table
from icecache.eval.record import Setup
from icecache.eval.results import ORACLES, Results

NEAR: Final = 0.02
"""Loads that differ by less are equal: what waits for the index differs by policy and step."""


@dataclass(frozen=True, slots=True)
class Stand:
    """Which arms of a policy stand for a load.

    Parameters
    ----------
    below, above : str
        Arms; the same one where it loads as much, or where the policy has none on the other side.
    share : float
        How much of `above` counts, 0 to 1: linear in the logarithm of the loaded tokens.
    loaded : float
        Tokens that stand behind it.
    kind : {"equal", "between", "less", "more"}
        Loads as much; lies between two arms; the nearest arm loads less, or more.
    """

    below: str
    above: str
    share: float
    loaded: float
    kind: str


def stand_in(arms: Sequence[tuple[str, float]], target: float) -> Stand:
    """Choose what stands for `target` loaded tokens.

    Parameters
    ----------
    arms : sequence of (str, float)
        Arms of one policy with what they load, at least one.
    target : float
        Tokens.
    """
    in_order = sorted(arms, key=lambda pair: pair[1])
    name, load = min(in_order, key=lambda pair: abs(math.log(pair[1] / target)))
    if abs(load / target - 1) <= NEAR:
        return Stand(name, name, 0.0, load, "equal")
    lower, upper = [a for a in in_order if a[1] < target], [a for a in in_order if a[1] > target]
    if not lower or not upper:
        return Stand(name, name, 0.0, load, "less" if load < target else "more")
    (below, low), (above, high) = lower[-1], upper[0]
    return Stand(below, above, math.log(target / low) / math.log(high / low), target, "between")


def at_equal_load(results: Results, setup: Setup, length: int, ours: str) -> str:
    """Write rivals at the loads of our arms: their score there, and ours minus it; empty where there is nothing.

    Parameters
    ----------
    results : Results
        The run.
    setup, length
        Group of cells.
    ours : str
        The policy whose arms give the loads.
    """
    tasks = [cell.task for cell in results.of_group(setup, length)]
    load = {arm: loaded(results, (setup, length), tasks, arm) for arm in results.arms}
    policies = by_policy(arm for arm in results.arms if load[arm])
    own = policies.get(ours, [])
    rivals = {name: arms for name, arms in policies.items() if name != ours and name not in ORACLES}
    if not own or not rivals:
        return ""
    header = ["rival"]
    for arm in own:
        header += [f"at {number(load[arm])} loaded", f"{arm} minus it"]
    rows = []
    for name, arms in rivals.items():
        row = [name]
        for arm in own:
            known = [(a, float(load[a] or 0.0)) for a in arms]
            row += _compared(results, setup, length, arm, stand_in(known, float(load[arm] or 0.0)))
        rows.append(row)
    text = (
        f"What each policy scores where it loads as many tokens per KV head as an arm of `{ours}` (within 2 %), macro "
        'over tasks that discriminate. "~": between two of its arms, straight in the logarithm of the load, sample by '
        "sample; a real arm there may be better or worse. With a number: it has no arm on the other side, so the "
        "nearest one stands here with what it loads."
    )
    return f"### At equal load\n\n{text}\n\n{table(header, rows)}"


def _compared(results: Results, setup: Setup, length: int, ours: str, stand: Stand) -> list[str]:
    """Score of the stand-in, and ours minus it."""
    ones, others = [], []
    for cell in results.averaged(setup, length, ["full", ours, stand.below, stand.above]):
        found = [results.records(cell, arm) for arm in (ours, stand.below, stand.above)]
        ids = sorted(found[0].keys() & found[1].keys() & found[2].keys())
        if ids:
            mine, low, high = (np.array([arm[i].score for i in ids], dtype=np.float64) for arm in found)
            ones.append(mine)
            others.append((1 - stand.share) * low + stand.share * high)
    if not ones:
        return [ABSENT, ABSENT]
    score = points(sum(float(scores.mean()) for scores in others) / len(others))
    mark = {"equal": "", "between": "~"}.get(stand.kind)
    shown = f"{score} ({number(stand.loaded)})" if mark is None else f"{mark}{score}"
    return [shown, signed(stats.macro_difference(others, ones))]
