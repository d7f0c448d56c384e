"""The result table of the demo, as text and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from statistics import fmean

from icecache.demo.arms import ARMS, Arm, Measurement


def by_arm(measurements: Sequence[Measurement]) -> dict[Arm, list[Measurement]]:
    """Group measurements, in the order of `ARMS`; arms without any are left out."""
    grouped = {arm: [m for m in measurements if m.arm == arm] for arm in ARMS}
    return {arm: group for arm, group in grouped.items() if group}


def score(measurements: Sequence[Measurement], task: str | None = None) -> float:
    """Share of exact matches, of one task or of all."""
    return fmean(m.outcome.exact_match for m in measurements if task in {None, m.outcome.sample.task})


def megabytes(n_bytes: float) -> str:
    """Bytes as mebibytes: "16.8 MiB"."""
    return f"{n_bytes / 2**20:.2f} MiB" if n_bytes else "-"


def table_rows(measurements: Sequence[Measurement], tasks: Sequence[str]) -> list[list[str]]:
    """Cells of the table, the header first.

    Parameters
    ----------
    measurements : sequence of Measurement
        Every arm on every sample.
    tasks : sequence of str
        Columns of scores.

    Returns
    -------
    list of list of str
        All of one length.
    """
    header = ["", *tasks, "all", "attended", "of context", "KV device", "KV host", "ms/token", "prefill s", "index ms"]
    rows = [header]
    for arm, group in by_arm(measurements).items():
        index_ms = fmean(m.index_seconds for m in group) * 1e3
        rows.append(
            [
                arm.label,
                *(f"{score(group, task):.2f}" for task in tasks),
                f"{score(group):.2f}",
                f"{fmean(m.attended for m in group):.0f}",
                f"{fmean(m.share for m in group):.1%}",
                megabytes(fmean(m.device_bytes for m in group)),
                megabytes(fmean(m.host_bytes for m in group)),
                f"{fmean(m.outcome.seconds_per_token for m in group) * 1e3:.1f}",
                f"{fmean(m.prefill_seconds for m in group):.1f}",
                "-" if arm.kind == "full" else f"{index_ms:.0f}",
            ]
        )
    return rows


def render(rows: Sequence[Sequence[str]]) -> str:
    """Align cells: the first column to the left, the others to the right; a rule below the header and each kind."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    rule = "-" * max(map(len, lines))
    return "\n".join([lines[0], rule, *lines[1:]])


def to_json(measurements: Sequence[Measurement], facts: dict[str, object]) -> str:
    """Every measurement with its sample's task, seed and row, under the facts of the run."""
    return json.dumps({**facts, "measurements": [_as_fields(m) for m in measurements]}, indent=1) + "\n"


def _as_fields(m: Measurement) -> dict[str, object]:
    sample = m.outcome.sample
    return {
        "policy": m.arm.kind,
        "budget": m.arm.budget,
        "task": sample.task,
        "seed": sample.seed,
        "row": sample.row,
        "exact_match": m.outcome.exact_match,
        "attended": m.attended,
        "share": m.share,
        "device_bytes": m.device_bytes,
        "host_bytes": m.host_bytes,
        "ms_per_token": m.outcome.seconds_per_token * 1e3,
        "n_steps": m.outcome.n_steps,
        "prefill_seconds": m.prefill_seconds,
        "index_ms": m.index_seconds * 1e3,
        "mass_kept": None if math.isnan(m.mass_kept) else m.mass_kept,
    }
