"""Run cells one after another, each in a fresh process, skipping those already measured."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from ann import cell
from ann.cell import Event
from ann.options import Options
from ann.peers import PEERS

#: Events that end a cell.
ENDS = ("done", "cut", "absent", "failed", "killed")
#: One thread unless a measurement says otherwise, and no spinning while waiting: it would count as CPU time.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
}


def read(file: Path) -> list[Event]:
    """Events of a cell so far; none where there is no file. A line cut short by a kill is left out."""
    if not file.exists():
        return []
    # What follows the last line break was being written when the process ended.
    return [json.loads(line) for line in file.read_text().split("\n")[:-1]]


def ended(file: Path) -> bool:
    """Whether a cell needs no further run. A peer that was absent is tried again: it may be installed by now."""
    events = read(file)
    return bool(events) and events[-1]["event"] in ENDS and events[-1]["event"] != "absent"


def plan(data: list[str], peers: list[str], metrics: dict[str, str]) -> list[tuple[str, str]]:
    """Cells in order: all peers of the first data set first. Peers that do not apply to its metric are left out."""
    return [(d, p) for d in data for p in peers if metrics[d] in PEERS[p].metrics]


def run_all(cells: list[tuple[str, str]], options: Options, say: Callable[[str], None]) -> None:
    """Run what is missing. A process that dies or is killed ends its cell, not the run."""
    options.out.mkdir(parents=True, exist_ok=True)
    for number, (data, peer) in enumerate(cells, 1):
        file = cell.path(options.out, data, peer)
        label = f"[{number}/{len(cells)}] {data} {peer}"
        if ended(file):
            say(f"{label}: kept")
            continue
        start = time.perf_counter()
        try:
            with fresh_pool() as pool:
                pool.submit(cell.run, peer, data, options).result()
        except BrokenProcessPool:
            _end(file, f"process died after {time.perf_counter() - start:.0f} s (limit {options.wall_s} s)")
        events = read(file)
        note = str(events[-1].get("note", "")).strip().splitlines() if events else []
        outcome = events[-1]["event"] if events else "nothing"
        say(f"{label}: {outcome} in {time.perf_counter() - start:.0f} s {note[-1] if note else ''}".rstrip())


def fresh_pool() -> ProcessPoolExecutor:
    """One worker, a fresh interpreter: memory growth and threads are the peer's own."""
    os.environ.update(ENVIRONMENT)
    return ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn"))


def _end(file: Path, note: str) -> None:
    events = [*read(file), {"event": "killed", "note": note}]
    file.write_text("".join(json.dumps(event) + "\n" for event in events))
