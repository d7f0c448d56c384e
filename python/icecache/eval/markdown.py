"""Numbers and tables as markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence

from icecache.eval.stats import Interval

ABSENT = "-"


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write a table, columns aligned: the first to the left, the others to the right."""
    every = [header, *rows]
    widths = [max(3, *(len(row[i]) for row in every)) for i in range(len(header))]
    lines = []
    for row in every:
        cells = [
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(f"| {' | '.join(cells)} |")
    rule = ["-" * w if i == 0 else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    lines.insert(1, f"| {' | '.join(rule)} |")
    return "\n".join(lines)


def points(value: float | None) -> str:
    """Write a share of 1 as points: "96.9"."""
    return ABSENT if value is None or math.isnan(value) else f"{100 * value:.1f}"


def signed(interval: Interval) -> str:
    """Write a difference with its interval in points: "-1.6 [-4.7, 1.2]"."""
    if math.isnan(interval.estimate):
        return ABSENT
    return f"{100 * interval.estimate:+.1f} [{100 * interval.low:+.1f}, {100 * interval.high:+.1f}]"


def share(interval: Interval) -> str:
    """Write a ratio with its interval: "0.984 [0.951, 1.013]"."""
    if math.isnan(interval.estimate):
        return ABSENT
    return f"{interval.estimate:.3f} [{interval.low:.3f}, {interval.high:.3f}]"


def number(value: float | None, digits: int = 0) -> str:
    """Write a number with so many decimals."""
    return ABSENT if value is None or math.isnan(value) else f"{value:,.{digits}f}"
