"""`icecache eval compare`: two arms pair by pair, of one run or of two."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from icecache.errors import ConfigError, DataError
from icecache.eval import stats
from icecache.eval.markdown import points, share, signed, table
from icecache.eval.record import Setup
from icecache.eval.results import Cell, Pairs, Results, pair_up


@dataclass(frozen=True, slots=True)
class Side:
    """An arm of a run.

    Parameters
    ----------
    results : Results
        The run.
    arm : str
        Which.
    """

    results: Results
    arm: str


def compare(folders: Sequence[Path], arms: Sequence[str] = ()) -> str:
    """Compare two arms on the samples both have.

    Parameters
    ----------
    folders : sequence of Path
        One run, or two.
    arms : sequence of str, default=()
        Two arms: both of the one run, or the first of the first and the second of the second. Empty, with two runs:
        every arm they share.

    Returns
    -------
    str
        Markdown.

    Raises
    ------
    ConfigError
        If there are not one or two folders, or not two arms where they are needed, or an arm did not run.
    DataError
        If a folder holds no run, or nothing can be paired.
    """
    if len(folders) not in (1, 2):
        msg = f"compare needs one or two folders, got {len(folders)}"
        raise ConfigError(msg)
    if len(arms) != 2 and (arms or len(folders) == 1):
        msg = f"--arms must name two arms such as icecache@64,full, got {','.join(arms) or 'none'}"
        raise ConfigError(msg)
    runs = [Results.read(folder) for folder in folders]
    if arms:
        for results, arm in zip((runs[0], runs[-1]), arms, strict=True):
            results.check_arms([arm])
        pairs = [(Side(runs[0], arms[0]), Side(runs[-1], arms[1]))]
    else:
        pairs = [(Side(runs[0], arm), Side(runs[1], arm)) for arm in runs[0].arms if arm in runs[1].arms]
    parts = [part for first, second in pairs for part in _sections(first, second)]
    if not parts:
        msg = "nothing can be paired: the runs share no samples"
        raise DataError(msg)
    return "\n\n".join(parts)


def _sections(first: Side, second: Side) -> Iterator[str]:
    groups = [group for group in first.results.groups if group in second.results.groups]
    for setup, length in groups:
        rows = list(_rows(first, second, setup, length))
        if rows:
            name = f"{second.arm} minus {first.arm}, setup {setup}" + (f", {length:,} tokens" if length else "")
            header = ["task", "n", "first", "second", "difference", "ratio", "only first / second right", "p"]
            yield f"### {name}\n\n{table([*header, 'cannot resolve'], rows)}"


def _rows(first: Side, second: Side, setup: Setup, length: int) -> Iterator[list[str]]:
    found: list[tuple[Cell, Pairs]] = []
    for cell in first.results.of_group(setup, length):
        pairs = pair_up(first.results.records(cell, first.arm), second.results.records(cell, second.arm))
        if pairs is not None:
            found.append((cell, pairs))
    for cell, pairs in found:
        yield [cell.task, *_row([pairs])]
    counted = set(first.results.averaged(setup, length, [first.arm]))
    counted &= set(second.results.averaged(setup, length, [second.arm]))
    used = [pairs for cell, pairs in found if cell in counted]
    if used:
        left_out = [cell.task for cell, _ in found if cell not in counted]
        name = f"macro without {', '.join(left_out)} (not discriminating)" if left_out else "macro"
        yield [name, *_row(used)]


def _row(pairs: Sequence[Pairs]) -> list[str]:
    first, second = [p.first for p in pairs], [p.second for p in pairs]
    counts = [stats.mcnemar(p.first, p.second) for p in pairs]
    only_first, only_second = sum(c.only_first for c in counts), sum(c.only_second for c in counts)
    return [
        str(sum(len(p.ids) for p in pairs)),
        points(sum(float(one.mean()) for one in first) / len(first)),
        points(sum(float(two.mean()) for two in second) / len(second)),
        signed(stats.macro_difference(first, second)),
        share(stats.macro_ratio(first, second)),
        f"{only_first} / {only_second}",
        f"{stats.binomial_p(only_first, only_second):.2g}",
        f"< {points(stats.macro_resolution(first, second))}",
    ]
