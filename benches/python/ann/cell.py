"""Everything measured about one peer on one data set, in a process of its own."""

from __future__ import annotations

import json
import signal
import time
import traceback
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from ann import datasets
from ann.clock import anonymous_bytes, cpu_s
from ann.datasets import Dataset
from ann.options import DEPTHS, Options
from ann.peers import PEERS
from ann.peers.base import Peer
from ann.sweep import Point, curve, fastest
from ann.truth import DEPTH, Ids, exact, recall

_SINGLES = 512  # insertions and deletions by one; the rest go by batch
BATCH = 256
_CHURN_QUERIES = 300
Event = dict[str, object]


def path(out: Path, data: str, peer: str) -> Path:
    """File of a cell."""
    return out / f"{data}--{peer}.jsonl"


def run(peer_name: str, data_name: str, options: Options) -> None:
    """Measure a cell and append what is learnt to its file as it comes; the last line is its end.

    The process is killed by SIGALRM after `options.wall_s`; then the file has no end, which the runner adds.
    """
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(options.wall_s)
    with path(options.out, data_name, peer_name).open("w") as file:
        for event in _guarded(peer_name, data_name, options):
            file.write(json.dumps(event) + "\n")
            file.flush()


def _guarded(peer_name: str, data_name: str, options: Options) -> Iterator[Event]:
    """Events of a cell, ended by "done", "cut" (budget), "absent" (not installed) or "failed"."""
    data = datasets.load(data_name, options.cache)
    try:
        peer = PEERS[peer_name].make()
    except ImportError as error:
        yield {"event": "absent", "note": str(error)}
        return
    yield {"event": "peer", "name": peer_name, "version": PEERS[peer_name].version()}
    try:
        yield from measure(peer, data, options)
    except Exception:  # a library that fails is a result, and the others go on
        yield {"event": "failed", "note": traceback.format_exc(limit=3)}


def measure(peer: Peer, data: Dataset, options: Options) -> Iterator[Event]:
    """Build, curves, insertions and deletions, churn."""
    start = time.process_time()

    def spent() -> bool:
        return time.process_time() - start > options.cpu_s

    yield {"event": "data", "name": data.name, "n": len(data.base), "digest": data.digest, "about": data.about}
    yield _build(peer, data, options.build_threads)
    peer.threads(1)
    points: dict[int, list[Point]] = {}
    for k in DEPTHS:
        points[k] = []
        for point in curve(peer, data, k, options.repeats, spent):
            points[k].append(point)
            yield point.event()
    if peer.can_add and not spent():
        yield _insert(peer, data)
    if peer.can_remove and not spent() and peer.can_add:
        yield _remove(peer, data)
    if peer.can_remove and peer.can_add and len(data.base) <= options.churn_n and not spent():
        yield _churn(peer, data, points[DEPTHS[0]], options)
    yield {"event": "cut" if spent() else "done", "cpu_s": round(time.process_time() - start, 1)}


def _build(peer: Peer, data: Dataset, threads: int) -> Event:
    before = anonymous_bytes()
    clock = time.perf_counter()
    seconds = cpu_s(lambda: peer.build(data.base, data.metric, threads))
    elapsed = time.perf_counter() - clock
    grown = (anonymous_bytes() - before) / len(data.base)
    payload = peer.component_bytes * data.base.shape[1]
    own = getattr(peer, "own_bytes", None)  # only ours counts for itself
    declared = round(own() / len(data.base) - payload, 1) if own else None
    return {
        "event": "build", "threads": threads, "cpu_s": round(seconds, 3), "wall_s": round(elapsed, 3),
        "bytes": round(grown, 1), "payload": payload, "overhead": round(grown - payload, 1), "declared": declared,
    }  # fmt: skip


def _blocks(count: int) -> Iterator[slice]:
    for start in range(_singles(count), count, BATCH):
        yield slice(start, min(start + BATCH, count))


def _singles(count: int) -> int:
    return min(_SINGLES, count // 2)


def _insert(peer: Peer, data: Dataset) -> Event:
    """Add the vectors that were kept back, by one and then by 256."""
    ids = np.arange(len(data.base), len(data.base) + len(data.extra))
    alone = _singles(len(ids))
    rows = np.array(data.extra)

    def singly() -> None:
        for row in range(alone):
            peer.add(ids[row : row + 1], rows[row : row + 1])

    def batched() -> None:
        for block in _blocks(len(ids)):
            peer.add(ids[block], rows[block])

    single, batch = cpu_s(singly), cpu_s(batched)
    return {
        "event": "insert",
        "single_us": round(1e6 * single / alone, 2),
        "batch_us": round(1e6 * batch / (len(ids) - alone), 2),
        "batch": BATCH,
    }


def _remove(peer: Peer, data: Dataset) -> Event:
    """Delete them again."""
    ids = np.arange(len(data.base), len(data.base) + len(data.extra))
    alone = _singles(len(ids))

    def singly() -> None:
        for row in range(alone):
            peer.remove(ids[row : row + 1])

    def batched() -> None:
        for block in _blocks(len(ids)):
            peer.remove(ids[block])

    single, batch = cpu_s(singly), cpu_s(batched)
    return {
        "event": "remove",
        "single_us": round(1e6 * single / alone, 2),
        "batch_us": round(1e6 * batch / (len(ids) - alone), 2),
        "batch": BATCH,
    }


def _churn(peer: Peer, data: Dataset, points: list[Point], options: Options) -> Event:
    """Recall after 25 % insertions and 25 % deletions beside a fresh build of what is left.

    Built from the first four fifths, the last fifth inserted, as many deleted at random. Asked with the default setting
    and with the one that reached recall .95 on the whole set.
    """
    n = len(data.base)
    first = n - n // 5
    rng = np.random.default_rng(options.seed)
    gone = np.sort(rng.choice(n, n // 5, replace=False))
    live = np.setdiff1d(np.arange(n), gone)
    peer.build(data.base[:first], data.metric, options.build_threads)
    peer.threads(1)
    for start in range(first, n, BATCH):
        peer.add(np.arange(start, min(start + BATCH, n)), np.array(data.base[start : start + BATCH]))
    for start in range(0, len(gone), BATCH):
        peer.remove(gone[start : start + BATCH])
    target = fastest([p for p in points if not p.default], 0.95)
    before = _recalls(peer, data, live, target, ids=np.arange(n))
    peer.build(np.ascontiguousarray(data.base[live]), data.metric, options.build_threads)
    peer.threads(1)
    after = _recalls(peer, data, live, target, ids=live)
    return {"event": "churn", "live": len(live), "churned": before, "fresh": after}


def _recalls(peer: Peer, data: Dataset, live: Ids, target: Point | None, ids: Ids) -> dict[str, float]:
    """Recall@10 over the live vectors; `ids[i]` is the row of the data set that the peer calls i."""
    queries = np.array(data.queries[:_CHURN_QUERIES])
    near, score = exact(queries, np.ascontiguousarray(data.base[live]), data.metric, DEPTH)
    lines = {line.name: line for line in peer.lines(10)}
    settings = {"default": (peer.lines(10)[0], peer.lines(10)[0].default)}
    if target is not None:
        settings[".95"] = (lines[target.line], target.effort)
    out = {}
    for name, (line, effort) in settings.items():
        peer.tune(line, effort)
        found = peer.search(queries, 10)
        rows = np.where(found >= 0, ids[np.maximum(found, 0)], -1)
        out[name] = round(recall(rows, (live[near], score), queries, data.base, data.metric), 4)
    return out
