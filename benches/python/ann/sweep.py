"""Find and time the settings of a peer that reach given recalls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial

from ann.clock import cpu_of, cpu_s, wall_s
from ann.datasets import Dataset
from ann.options import TARGETS
from ann.peers.base import Line, Peer
from ann.truth import Floats, recall

_MARGIN = 0.005  # how far past the highest target the doubling goes
_PLATEAU = 0.002  # three doublings that gain less than this each end a sweep
_CLOSE = 1.06  # a bracket of efforts this narrow is not divided further
_SINGLE_CPU_S = 0.5  # how long single queries are timed


@dataclass(slots=True)
class Point:
    """One setting: its recall, and microseconds per query. 0 = not timed that way.

    Attributes
    ----------
    batch_us : float
        CPU time of one call with all queries, one thread.
    single_us : float
        CPU time of one call per query.
    pair_us : float
        Elapsed time of one call with all queries on two threads.
    """

    k: int
    line: str
    effort: int
    recall: float
    batch_us: float
    single_us: float = 0.0
    pair_us: float = 0.0
    default: bool = False

    def event(self) -> dict[str, object]:
        """Give what is written down."""
        return {"event": "point", **asdict(self)}


Spent = Callable[[], bool]


def evaluate(peer: Peer, data: Dataset, k: int, line: Line, effort: int) -> Point:
    """Recall and one batch timing of a setting."""
    peer.tune(line, effort)
    seconds, found = cpu_of(lambda: peer.search(data.queries, k))
    share = recall(found, (data.truth, data.truth_scores), data.queries, data.base, data.metric)
    return Point(k, line.name, effort, round(share, 4), 1e6 * seconds / len(data.queries))


def efforts(
    peer: Peer, data: Dataset, k: int, line: Line, spent: Spent, targets: tuple[float, ...] = TARGETS
) -> Iterator[Point]:
    """Doubling efforts until recall is past the targets or stops growing, then bisection around each target."""
    tried: dict[int, Point] = {}

    def at(effort: int) -> Point:
        tried[effort] = evaluate(peer, data, k, line, effort)
        return tried[effort]

    enough = max(targets) + _MARGIN
    effort, flat, best = line.low, 0, 0.0
    while not spent():
        point = at(effort)
        yield point
        flat = flat + 1 if point.recall < best + _PLATEAU else 0
        best = max(best, point.recall)
        if point.recall >= enough or effort >= line.high or flat == 3:
            break
        effort = min(2 * effort, line.high)
    for target in targets:
        while not spent():
            passing = min((e for e, p in tried.items() if p.recall >= target), default=None)
            failing = max((e for e in tried if passing is not None and e < passing), default=None)
            if passing is None or failing is None or passing - failing < 2 or passing < _CLOSE * failing:
                break
            yield at((passing + failing) // 2)


def time_fully(peer: Peer, data: Dataset, point: Point, line: Line, repeats: int) -> Point:
    """Time a setting in all three ways, the fastest of `repeats`; `pair_us` with two threads."""
    peer.tune(line, point.effort)
    n = len(data.queries)
    batch = [cpu_s(lambda: peer.search(data.queries, point.k)) for _ in range(repeats)]
    point.batch_us = 1e6 * min([*batch, point.batch_us * n / 1e6]) / n
    point.single_us = min(_single_us(peer, data, point.k) for _ in range(repeats))
    peer.threads(2)
    point.pair_us = 1e6 * min(wall_s(lambda: peer.search(data.queries, point.k)) for _ in range(repeats)) / n
    peer.threads(1)
    return point


def _single_us(peer: Peer, data: Dataset, k: int) -> float:
    asked = 0
    total = 0.0
    while total < _SINGLE_CPU_S and asked < len(data.queries):
        block = data.queries[asked : asked + 50]
        total += cpu_s(partial(_ask, peer, block, k))
        asked += len(block)
    return 1e6 * total / asked


def _ask(peer: Peer, queries: Floats, k: int) -> None:
    for query in queries:
        peer.search_one(query, k)


def fastest(points: list[Point], target: float) -> Point | None:
    """Give the point with the smallest batch time whose recall reaches `target`."""
    return min((p for p in points if p.recall >= target), key=lambda p: p.batch_us, default=None)


def curve(peer: Peer, data: Dataset, k: int, repeats: int, spent: Spent) -> Iterator[Point]:
    """All points of a peer for `k`: the default setting, then each line, timed fully where it is the one to use."""
    lines = peer.lines(k)
    by_name = {line.name: line for line in lines}
    default = evaluate(peer, data, k, lines[0], lines[0].default)
    default.default = True
    yield time_fully(peer, data, default, lines[0], repeats)
    points: list[Point] = []
    for line in lines:
        points += efforts(peer, data, k, line, spent)
    chosen = {id(p): p for target in TARGETS if (p := fastest(points, target))}
    for point in points:
        if id(point) in chosen:
            time_fully(peer, data, point, by_name[point.line], repeats)
        yield point
