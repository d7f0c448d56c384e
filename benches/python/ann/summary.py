"""From the lines a cell wrote to the figures of one row of the table."""

from __future__ import annotations

import json
import statistics
from dataclasses import dataclass, field
from pathlib import Path

from ann.runner import ENDS, read


@dataclass(slots=True)
class Row:
    """One peer on one data set. None = not measured.

    Attributes
    ----------
    overhead, declared : float
        Bytes a vector beside the vectors: growth of the process's memory, and what the index counts itself.
    points : list[dict]
        As `ann.sweep.Point`: recall and microseconds per query of each setting.
    pairs : dict[int, list[float]]
        By k, microseconds per query at recall .95 in each round of the interleaved run.
    """

    data: str
    peer: str
    version: str = ""
    end: str = "nothing"
    note: str = ""
    n: int = 0
    about: str = ""
    digest: str = ""
    build_cpu_s: float | None = None
    build_wall_s: float | None = None
    overhead: float | None = None
    declared: float | None = None
    insert_single_us: float | None = None
    insert_batch_us: float | None = None
    remove_single_us: float | None = None
    remove_batch_us: float | None = None
    churned: dict[str, float] = field(default_factory=dict)
    fresh: dict[str, float] = field(default_factory=dict)
    points: list[dict[str, float]] = field(default_factory=list)
    pairs: dict[int, list[float]] = field(default_factory=dict)

    def default_recall(self, k: int) -> float | None:
        """Recall without any setting."""
        return next((p["recall"] for p in self.points if p["default"] and p["k"] == k), None)

    def highest_recall(self, k: int) -> float | None:
        """Best recall of any setting tried."""
        return max((p["recall"] for p in self.points if p["k"] == k), default=None)

    def qps(self, k: int, target: float, mode: str = "batch_us") -> float | None:
        """Give the queries per second of the fastest measured setting with that recall; None if there is none."""
        times = [p[mode] for p in self.points if p["k"] == k and p["recall"] >= target and p[mode] > 0]
        return 1e6 / min(times) if times else None

    def churn_loss(self) -> float | None:
        """Largest loss of recall@10 against a fresh build over the settings tried."""
        losses = [self.fresh[name] - self.churned[name] for name in self.fresh]
        return round(max(losses), 6) if losses else None


def load(out: Path) -> list[Row]:
    """Rows of every cell file in the folder, with the rounds of the interleaved runs beside them."""
    rows = [row(file) for file in sorted(out.glob("*--*.jsonl")) if not file.name.startswith(("pairs--", "stream--"))]
    by_name = {(r.data, r.peer): r for r in rows}
    for file in sorted(out.glob("pairs--*.jsonl")):
        data = file.stem.removeprefix("pairs--")
        for line in map(json.loads, file.read_text().splitlines()):
            if (data, line["peer"]) in by_name:
                by_name[data, line["peer"]].pairs[line["k"]] = line["us"]
    return rows


def row(file: Path) -> Row:
    """One cell."""
    data, _, peer = file.stem.partition("--")
    out = Row(data, peer)
    for event in read(file):
        kind = event["event"]
        if kind == "peer":
            out.version = str(event["version"])
        elif kind == "data":
            out.n, out.about, out.digest = event["n"], event["about"], event["digest"]  # type: ignore[assignment]
        elif kind == "build":
            out.build_cpu_s, out.build_wall_s = event["cpu_s"], event["wall_s"]  # type: ignore[assignment]
            out.overhead, out.declared = event["overhead"], event.get("declared")  # type: ignore[assignment]
        elif kind == "point":
            out.points.append(event)  # type: ignore[arg-type]
        elif kind == "insert":
            out.insert_single_us, out.insert_batch_us = event["single_us"], event["batch_us"]  # type: ignore[assignment]
        elif kind == "remove":
            out.remove_single_us, out.remove_batch_us = event["single_us"], event["batch_us"]  # type: ignore[assignment]
        elif kind == "churn":
            out.churned, out.fresh = event["churned"], event["fresh"]  # type: ignore[assignment]
        elif kind in ENDS:
            out.end, out.note = str(kind), str(event.get("note", ""))
    return out


def paired_ratio(ours: Row, rival: Row, k: int) -> tuple[float, float, float] | None:
    """How many times faster we were round by round: median, lowest and highest."""
    rounds = [theirs / mine for mine, theirs in zip(ours.pairs.get(k, []), rival.pairs.get(k, []), strict=False)]
    return (statistics.median(rounds), min(rounds), max(rounds)) if rounds else None
