"""Table, summary, JSON and plot of what was measured."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from ann import plot, streaming, summary
from ann.summary import Row
from ann.verdicts import OURS, judge


def write(out: Path, save: Path | None) -> str:
    """Text of the report; with `save`, also PATH.txt, PATH.json and PATH.svg.

    Raises
    ------
    ValueError
        If the folder holds no measurement.
    """
    rows = summary.load(out)
    if not rows:
        msg = f"out: expected measurements in {out}, found none"
        raise ValueError(msg)
    streams = streaming.load(out)
    text = render(rows, streams)
    if save is not None:
        save.parent.mkdir(parents=True, exist_ok=True)
        save.with_suffix(".txt").write_text(text + "\n")
        result = {"machine": machine(), "rows": [asdict(row) for row in rows], "streams": streams}
        save.with_suffix(".json").write_text(json.dumps(result, separators=(",", ":")) + "\n")
        plot.draw(rows, save.with_suffix(".svg"))
    return text


def machine() -> dict[str, str]:
    """Where it ran and what it ran."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
    root = Path(__file__).parents[3]
    sha = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True, check=False)
    return {
        "cpu": model,
        "cores": str(os.cpu_count()),
        "commit": sha.stdout.strip() or "unknown",
        "python": platform.python_version(),
    }


def render(rows: list[Row], streams: list[dict[str, object]]) -> str:
    """Report as text."""
    where = machine()
    parts = [
        f"{where['cpu']}, {where['cores']} cores (shared), Python {where['python']}, commit {where['commit']}",
        "CPU time of one thread unless said otherwise; builds on two. The peers ran one after the other, ",
        "so under varying load they compare only roughly; ratios marked 'interleaved' come from turns in one run.",
    ]
    data = list(dict.fromkeys(row.data for row in rows))
    parts = ["\n".join(parts), *(table([row for row in rows if row.data == name]) for name in data)]
    parts.append("TARGETS\n" + "\n".join(verdict.line() for verdict in judge(rows)))
    parts.append("WHO IS BEST AT WHAT\n" + "\n".join(winners(rows)))
    if streams:
        parts.append(streaming.table(streams))
    missing = [f"{row.data} {row.peer}: {row.end} {_last_line(row.note)}".rstrip() for row in rows if row.end != "done"]
    if missing:
        parts.append(
            "INCOMPLETE (cut = CPU budget spent; a recall not reached then is not impossible)\n" + "\n".join(missing)
        )
    return "\n\n".join(parts)


def _last_line(note: str) -> str:
    return note.strip().splitlines()[-1] if note.strip() else ""


_COLUMNS: tuple[tuple[str, int, Callable[[Row], float | None], str], ...] = (
    ("build cpu s", 11, lambda r: r.build_cpu_s, ".2f"),
    ("wall s", 7, lambda r: r.build_wall_s, ".1f"),
    ("ins1 us", 8, lambda r: r.insert_single_us, ".1f"),
    ("ins256", 8, lambda r: r.insert_batch_us, ".1f"),
    ("del1 us", 8, lambda r: r.remove_single_us, ".1f"),
    ("B/vec", 6, lambda r: r.overhead, ".0f"),
    ("default", 7, lambda r: r.default_recall(10), ".3f"),
    ("max@10", 6, lambda r: r.highest_recall(10), ".3f"),
    ("q/s@.90", 8, lambda r: r.qps(10, 0.90), ".0f"),
    ("q/s@.95", 8, lambda r: r.qps(10, 0.95), ".0f"),
    ("q/s@.99", 8, lambda r: r.qps(10, 0.99), ".0f"),
    ("one@.95", 8, lambda r: r.qps(10, 0.95, "single_us"), ".0f"),
    ("2thr@.95", 8, lambda r: r.qps(10, 0.95, "pair_us"), ".0f"),
    ("max@100", 7, lambda r: r.highest_recall(100), ".3f"),
    ("100@.90", 8, lambda r: r.qps(100, 0.90), ".0f"),
    ("100@.95", 8, lambda r: r.qps(100, 0.95), ".0f"),
    ("churn", 6, lambda r: r.churn_loss(), ".3f"),
)


def table(rows: list[Row]) -> str:
    """One data set: a line per peer, fastest at recall@10 .95 first."""
    first = next((row for row in rows if row.n), rows[0])
    measured = [row for row in rows if row.points]
    measured.sort(key=lambda row: (-(row.qps(10, 0.95) or 0.0), -(row.highest_recall(10) or 0.0)))
    width = max([len(row.peer) + len(row.version) + 1 for row in measured], default=4)
    lines = [
        f"{first.data}: {first.n} vectors, sha256 {first.digest}\n  {first.about}",
        " ".join(["peer".ljust(width), *(name.rjust(max(w, len(name))) for name, w, _, _ in _COLUMNS)]),
    ]
    for row in measured:
        cells = [_cell(get(row), form).rjust(max(w, len(name))) for name, w, get, form in _COLUMNS]
        lines.append(" ".join([f"{row.peer} {row.version}".ljust(width), *cells]))
    return "\n".join(lines)


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def winners(rows: list[Row]) -> list[str]:
    """Per data set and figure: who is best among those that can be used there, and where we stand."""
    out = []
    for data in dict.fromkeys(row.data for row in rows):
        # A structure that cannot reach the recall is no answer, however quickly it is built.
        usable = [row for row in rows if row.data == data and (row.highest_recall(10) or 0.0) >= 0.9]
        for name, better, get in _FIGURES:
            figures = {row.peer: value for row in usable if (value := get(row)) is not None}
            if len(figures) < 2:
                continue
            pick = max if better == "high" else min
            best = pick(figures, key=figures.__getitem__)
            ours = figures.get(OURS)
            place = (
                sum(figures[p] > ours if better == "high" else figures[p] < ours for p in figures) + 1
                if ours is not None
                else 0
            )
            mine = "ours has none" if ours is None else f"ours {ours:.4g}, place {place} of {len(figures)}"
            out.append(f"{data:10s} {name:34s} {best:18s} {figures[best]:10.4g}   {mine}")
    return out


_FIGURES: tuple[tuple[str, str, Callable[[Row], float | None]], ...] = (
    ("queries/s, recall@10 .90", "high", lambda r: r.qps(10, 0.90)),
    ("queries/s, recall@10 .95", "high", lambda r: r.qps(10, 0.95)),
    ("queries/s, recall@10 .99", "high", lambda r: r.qps(10, 0.99)),
    ("queries/s one by one, @10 .95", "high", lambda r: r.qps(10, 0.95, "single_us")),
    ("queries/s, recall@100 .95", "high", lambda r: r.qps(100, 0.95)),
    ("recall@10 by default", "high", lambda r: r.default_recall(10)),
    ("build, CPU s", "low", lambda r: r.build_cpu_s),
    ("insert by one, us", "low", lambda r: r.insert_single_us),
    ("insert by 256, us", "low", lambda r: r.insert_batch_us),
    ("delete by one, us", "low", lambda r: r.remove_single_us),
    ("bytes a vector beside the vectors", "low", lambda r: r.overhead),
)
