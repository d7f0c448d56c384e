"""Streaming: insert, delete and search steps in turn, in the form of the big-ann-benchmarks streaming track.

A runbook is a list of steps on ranges of rows: ``insert start end``, ``delete start end``, ``search``. The score is the
mean recall@10 over the search steps. Two runbooks that a KV cache lives through: a window that slides over the data,
and clusters that come and go.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np

from ann import datasets, runner
from ann.cell import BATCH, Event
from ann.clock import cpu_of, cpu_s
from ann.datasets import Dataset
from ann.options import Options
from ann.peers import PEERS
from ann.peers.base import Peer
from ann.truth import Floats, Ids, exact, recall

_STEPS = 10
_CLUSTERS = 16
_QUERIES = 200
_MAX_VECTORS = 50_000
Operation = Literal["insert", "delete", "search"]


@dataclass(frozen=True, slots=True)
class Step:
    """One line of a runbook; `start` and `end` are rows, unused by a search."""

    operation: Operation
    start: int = 0
    end: int = 0


def sliding(n: int) -> list[Step]:
    """Grow to half of the rows, then each tenth that comes drives out the oldest."""
    block = n // _STEPS
    out: list[Step] = []
    for number in range(_STEPS):
        out.append(Step("insert", number * block, (number + 1) * block))
        if number >= _STEPS // 2:
            gone = number - _STEPS // 2
            out.append(Step("delete", gone * block, (gone + 1) * block))
        out.append(Step("search"))
    return out


def clustered(sizes: list[int]) -> list[Step]:
    """Rows are in order of cluster: each cluster comes as a whole, then every other one goes by halves."""
    bounds = np.concatenate([[0], np.cumsum(sizes)]).tolist()
    out: list[Step] = []
    for number in range(len(sizes)):
        out.append(Step("insert", bounds[number], bounds[number + 1]))
        if number % 4 == 3:
            out.append(Step("search"))
    for number in range(0, len(sizes), 2):
        out.append(Step("delete", bounds[number], (bounds[number] + bounds[number + 1]) // 2))
        if number % 4 == 2:
            out.append(Step("search"))
    return out


def by_cluster(rows: Floats, seed: int) -> tuple[Ids, list[int]]:
    """Order of rows by the nearest of 16 of them, and how many each has."""
    pivots = rows[np.random.default_rng(seed).choice(len(rows), _CLUSTERS, replace=False)]
    owner = exact(np.array(rows), pivots, "l2", 1)[0][:, 0]
    return np.argsort(owner, kind="stable"), np.bincount(owner, minlength=_CLUSTERS).tolist()


def yaml(name: str, steps: list[Step], n: int) -> str:
    """Give the runbook as the track's own file."""
    lines = [f"{name}:", f"  max_pts: {n}"]
    for number, step in enumerate(steps, 1):
        lines += [f"  {number}:", f'    operation: "{step.operation}"']
        if step.operation != "search":
            lines += [f"    start: {step.start}", f"    end: {step.end}"]
    return "\n".join(lines) + "\n"


def play(peer: Peer, data: Dataset, rows: Floats, steps: list[Step]) -> Event:
    """Run a runbook at the peer's default setting; the first insertion is its build."""
    queries = np.array(data.queries[:_QUERIES])
    live = np.empty(0, np.int64)
    spent = {"insert": 0.0, "delete": 0.0, "search": 0.0}
    counts = {"insert": 0, "delete": 0, "search": 0}
    recalls: list[float] = []
    for step in steps:
        ids = np.arange(step.start, step.end)
        if step.operation == "insert":
            block = np.ascontiguousarray(rows[ids])
            spent["insert"] += cpu_s(partial(_insert, peer, data, block, ids))
            live = np.concatenate([live, ids])
        elif step.operation == "delete":
            spent["delete"] += cpu_s(partial(peer.remove, ids))
            live = np.setdiff1d(live, ids)
        else:
            line = peer.lines(10)[0]
            peer.tune(line, line.default)
            seconds, found = cpu_of(partial(peer.search, queries, 10))
            spent["search"] += seconds
            near, score = exact(queries, np.ascontiguousarray(rows[live]), data.metric, 10)
            recalls.append(recall(found, (live[near], score), queries, rows, data.metric))
        counts[step.operation] += len(queries) if step.operation == "search" else len(ids)
    us = {f"{name}_us": round(1e6 * spent[name] / max(1, counts[name]), 2) for name in spent}
    return {"recall": round(float(np.mean(recalls)), 4), "worst": round(min(recalls), 4), **us}


def _insert(peer: Peer, data: Dataset, block: Floats, ids: Ids) -> None:
    if ids[0] == 0:
        peer.build(block, data.metric, 1)
        peer.threads(1)
        return
    for start in range(0, len(ids), BATCH):
        peer.add(ids[start : start + BATCH], block[start : start + BATCH])


def run(peer_name: str, data_name: str, options: Options) -> list[Event]:
    """Both runbooks, in the process that calls it."""
    data = datasets.load(data_name, options.cache)
    n = min(len(data.base), _MAX_VECTORS)
    order, sizes = by_cluster(data.base[:n], options.seed)
    books = {
        "sliding": (np.array(data.base[:n]), sliding(n)),
        "clustered": (np.ascontiguousarray(data.base[:n][order]), clustered(sizes)),
    }
    out: list[Event] = []
    for name, (rows, steps) in books.items():
        (options.out / f"{data_name}-{name}.yaml").write_text(yaml(f"{data_name}-{name}", steps, n))
        peer = PEERS[peer_name].make()
        if not (peer.can_add and peer.can_remove):
            return []
        out.append({"data": data_name, "peer": peer_name, "runbook": name, **play(peer, data, rows, steps)})
    return out


def run_all(cells: list[tuple[str, str]], options: Options, say: Callable[[str], None]) -> None:
    """Play the runbooks on every cell whose peer can insert and delete."""
    options.out.mkdir(parents=True, exist_ok=True)
    for data, peer in cells:
        file = options.out / f"stream--{data}--{peer}.json"
        if file.exists():
            continue
        try:
            with runner.fresh_pool() as pool:
                events = pool.submit(run, peer, data, options).result()
        except Exception as error:  # whatever a library does, the others go on
            say(f"{data} {peer}: left out ({error!r})")
            continue
        file.write_text(json.dumps(events) + "\n")
        for event in events:
            say(json.dumps(event))


def load(out: Path) -> list[Event]:
    """Everything played so far."""
    return [event for file in sorted(out.glob("stream--*.json")) for event in json.loads(file.read_text())]


def table(events: list[Event]) -> str:
    """Text of the results, best recall first within a runbook."""
    head = f"{'data':10s} {'runbook':10s} {'peer':18s} {'mean r@10':>9s} {'worst':>7s} "
    head += f"{'insert':>9s} {'delete':>9s} {'search':>9s}"
    ranked = sorted(events, key=lambda e: (str(e["data"]), str(e["runbook"]), -float(str(e["recall"]))))
    rows = [
        f"{e['data']:10s} {e['runbook']:10s} {e['peer']:18s} {e['recall']:9.3f} {e['worst']:7.3f} "
        f"{e['insert_us']:9.2f} {e['delete_us']:9.2f} {e['search_us']:9.1f}"
        for e in ranked
    ]
    title = f"STREAMING, default settings, insertion by {BATCH}, CPU us each, one thread"
    return "\n".join([title, head, *rows])
