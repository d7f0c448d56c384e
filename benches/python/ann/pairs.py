"""The top contenders in one interleaved run: every process keeps its index, and they take turns.

On a shared machine the speed of the same code varies by tens of per cent within minutes. Ratios of neighbours in time
vary much less, so each round asks every contender once, and what counts is the median ratio and its spread over the
rounds.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable
from functools import partial
from itertools import groupby
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from pathlib import Path

from ann import cell, datasets, summary
from ann.clock import cpu_s
from ann.datasets import Dataset
from ann.options import DEPTHS, Options
from ann.peers import PEERS
from ann.peers.base import Peer
from ann.runner import ENVIRONMENT
from ann.summary import Row
from ann.sweep import Point, efforts, evaluate, fastest

TARGET = 0.95
_REBUILT = 0.003  # recall that two builds of one graph differ by, threads being what they are


def path(out: Path, data: str) -> Path:
    """File of a data set's rounds; one line per peer and depth."""
    return out / f"pairs--{data}.jsonl"


def run_all(cells: list[tuple[str, str]], options: Options, rounds: int, say: Callable[[str], None]) -> None:
    """Interleave the peers of each data set and write their microseconds per query, round by round."""
    options.out.mkdir(parents=True, exist_ok=True)
    os.environ.update(ENVIRONMENT)
    for data, group in groupby(cells, key=lambda pair: pair[0]):
        lines = _interleave(data, [peer for _, peer in group], options, rounds, say)
        path(options.out, data).write_text("".join(json.dumps(line) + "\n" for line in lines))


def _interleave(
    data: str, peers: list[str], options: Options, rounds: int, say: Callable[[str], None]
) -> list[cell.Event]:
    context = multiprocessing.get_context("spawn")
    alive: dict[str, Connection] = {}
    workers: list[SpawnProcess] = []
    results: dict[tuple[str, int], cell.Event] = {}
    for peer in peers:  # one build at a time
        here, there = context.Pipe()
        worker = context.Process(target=serve, args=(there, peer, data, options), daemon=True)
        worker.start()
        there.close()
        workers.append(worker)
        answer = _ask(here, None)
        if not isinstance(answer, dict):
            say(f"{data} {peer}: left out ({answer})")
            continue
        alive[peer] = here
        for k, chosen in answer.items():
            results[peer, k] = {"event": "pair", "peer": peer, "k": k, "target": TARGET, **chosen, "us": []}
        say(f"{data} {peer}: { ({k: (v['line'], v['effort'], v['recall']) for k, v in answer.items()}) }")
    for number in range(rounds):
        order = list(alive)[number % max(1, len(alive)) :] + list(alive)[: number % max(1, len(alive))]
        for k in DEPTHS:
            for peer in order:
                if (peer, k) not in results or peer not in alive:
                    continue
                took = _ask(alive[peer], k)
                if not isinstance(took, float):
                    say(f"{data} {peer}: died ({took})")
                    del alive[peer]
                    continue
                us = results[peer, k]["us"]
                assert isinstance(us, list)
                us.append(round(took, 3))
    for worker in workers:
        worker.terminate()
    return list(results.values())


def _ask(connection: Connection, k: int | None) -> object:
    """Send `k` (or nothing, to hear about the build) and give the answer; a string says what went wrong."""
    try:
        if k is not None:
            connection.send(k)
        return connection.recv()
    except (EOFError, OSError) as error:
        return repr(error)


def _setting(peer: Peer, data: Dataset, k: int, known: Row) -> Point | None:
    """Give the fastest setting that reaches the target: the one its cell found if it still does, or a new one."""
    lines = {line.name: line for line in peer.lines(k)}
    points = [p for p in known.points if p["k"] == k and p["recall"] >= TARGET]
    if points:
        best = min(points, key=lambda p: p["batch_us"])
        again = evaluate(peer, data, k, lines[str(best["line"])], int(best["effort"]))
        if again.recall >= TARGET - _REBUILT:
            return again
    return fastest(
        [p for line in lines.values() for p in efforts(peer, data, k, line, lambda: False, (TARGET,))], TARGET
    )


def serve(connection: Connection, peer_name: str, data_name: str, options: Options) -> None:
    """Build, find the settings for recall .95, then time them whenever asked."""
    data = datasets.load(data_name, options.cache)
    try:
        peer = PEERS[peer_name].make()
        peer.build(data.base, data.metric, options.build_threads)
        peer.threads(1)
        known = summary.row(cell.path(options.out, data_name, peer_name))
        chosen = {k: best for k in DEPTHS if (best := _setting(peer, data, k, known))}
    except Exception as error:  # reported to the parent, which goes on without this peer
        connection.send(repr(error))
        return
    connection.send({k: {"line": p.line, "effort": p.effort, "recall": p.recall} for k, p in chosen.items()})
    while True:
        try:
            k = connection.recv()
        except EOFError:
            return
        line = next(line for line in peer.lines(k) if line.name == chosen[k].line)
        peer.tune(line, chosen[k].effort)
        connection.send(1e6 * cpu_s(partial(peer.search, data.queries, k)) / len(data.queries))
