"""`icecache eval selftest`: the harness on the shipped model, with gates that a broken selection does not pass.

The gates leave room for what 40 answers cannot resolve: measured at seed 0, icecache@128 loses 0 to 3 points to full
attention, random pages and sink + window lose 90 and more.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from icecache.eval import stats
from icecache.eval.options import EvalOptions
from icecache.eval.results import Pairs, Results

LENGTH, SAMPLES, BUDGET = 1024, 8, 128
TASKS: Final = ("passkey", "kv32", "vt3", "gsm", "chase8")
ARMS: Final = ("exact", f"icecache@{BUDGET}", f"random@{BUDGET}", f"streaming@{BUDGET}")
# Of 40 answers 3 may be lost; a search that fails loses nearly all.
CLOSE, LOWEST, FAR, NEAR = 0.08, 0.20, 0.40, 0.25


def selftest(write: Callable[[str], None], tasks: tuple[str, ...] = TASKS, samples: int = SAMPLES) -> int:
    """Run the shipped model on a few tasks and judge.

    Parameters
    ----------
    write : callable
        Takes the lines.
    tasks : tuple of str, default: five
        Of the suite `needle`.
    samples : int, default=8
        A task.

    Returns
    -------
    int
        0: all gates passed, 1: at least one failed.
    """
    from icecache.eval.run import run_eval

    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        options = EvalOptions(
            out=Path(folder),
            tasks=tasks,
            lengths=(LENGTH,),
            policies=("icecache",),
            budgets=(BUDGET,),
            controls=("full", "exact", "random", "streaming"),
            limit=samples,
            batch=samples,
        )
        run_eval(options, write=lambda _: None, command=["icecache", "eval", "selftest"])
        results = Results.read(Path(folder))
    verdicts = judge(results)
    for line, passed in verdicts:
        write(f"{'ok  ' if passed else 'FAIL'}  {line}")
    write(f"{len(verdicts)} gates, {LENGTH} tokens, {samples} samples a task, {time.perf_counter() - began:.0f} s")
    return 0 if all(passed for _, passed in verdicts) else 1


def judge(results: Results) -> list[tuple[str, bool]]:
    """Judge every gate; a gate whose arm did not run fails.

    Parameters
    ----------
    results : Results
        Of a run.
    """
    exact, ours, chance, near = (_paired(results, arm) for arm in ARMS)
    full = _score(ours, first=True)
    differing = sum(
        results.records(cell, "full")[name].prediction != record.prediction
        for cell in results.cells
        for name, record in results.records(cell, "exact").items()
    )
    lost = stats.macro_difference([p.first for p in ours], [p.second for p in ours])
    budgets = [results.mean(results.cells, arm, "attended") or 0.0 for arm in ARMS[1:]]
    return [
        (f"full attention answers: {full:.2f} >= 0.90", full >= 0.90),
        (
            f"a budget over the whole context gives the same tokens: {differing} answers differ",
            bool(exact) and not differing,
        ),
        (f"{ARMS[1]} loses {-lost.estimate:.3f} <= {CLOSE}", bool(ours) and lost.estimate >= -CLOSE),
        (f"its interval begins at {lost.low:.3f} >= -{LOWEST}", bool(ours) and lost.low >= -LOWEST),
        (f"random pages reach {_score(chance):.2f} <= full - {FAR}", bool(chance) and _score(chance) <= full - FAR),
        (f"sink and window alone reach {_score(near):.2f} <= {NEAR}", bool(near) and _score(near) <= NEAR),
        (
            f"all attended to their budget: {', '.join(f'{b:.0f}' for b in budgets)} of {BUDGET} to {BUDGET + 16}",
            all(BUDGET - 16 <= b <= BUDGET + 16 for b in budgets),
        ),
    ]


def _paired(results: Results, arm: str) -> list[Pairs]:
    return [pairs for cell in results.cells if (pairs := results.pairs(cell, "full", arm))]


def _score(pairs: Sequence[Pairs], *, first: bool = False) -> float:
    means = [float((p.first if first else p.second).mean()) for p in pairs]
    return sum(means) / len(means) if means else float("nan")
