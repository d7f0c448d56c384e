"""What a run of the benchmark may spend and where it keeps things."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

#: Recalls whose fastest setting is looked for.
TARGETS = (0.90, 0.95, 0.99)
#: Neighbours asked for.
DEPTHS = (10, 100)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Limits and places; the same for every peer.

    Attributes
    ----------
    cache, out : Path
        Folder of the data sets; folder of the results, one JSON-lines file a cell.
    cpu_s : float
        CPU seconds after which a cell starts no further measurement. What is missing then is "not reached in budget".
    wall_s : int
        Seconds after which a cell is killed, whatever it is doing.
    repeats : int
        Timings of a chosen setting, of which the fastest counts.
    churn_n : int
        Largest data set on which recall after insertions and deletions is measured; it needs two more builds.
    build_threads : int
        Threads of the builds.
    seed : int
        Which vectors the churn removes.
    """

    cache: Path
    out: Path
    cpu_s: float = 240.0
    wall_s: int = 1800
    repeats: int = 3
    churn_n: int = 50_000
    build_threads: int = 2
    seed: int = 0
