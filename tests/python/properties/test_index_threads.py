"""The concurrency contract of `icecache.Index`, with many threads at once."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest
from icecache.index import Index

DIM = 16


def row(vector_id: int) -> np.ndarray:
    """A vector that tells its id."""
    return np.random.default_rng(vector_id).standard_normal(DIM, dtype=np.float32)


def rows(ids: np.ndarray) -> np.ndarray:
    return np.stack([row(int(i)) for i in ids])


@pytest.mark.parametrize("metric", ["ip", "l2"])
def test_nothing_returned_is_lost_and_nothing_removed_comes_back(metric):
    """Two writers with ids of their own and three readers; every reader checks what had returned before it asked."""
    index = Index(DIM, metric, threads=2)
    added, leaving, removed = [set(), set()], [set(), set()], [set(), set()]
    problems, stop = [], threading.Event()

    def write(me: int) -> None:
        rng = np.random.default_rng(me)
        for step in range(120):
            ids = np.arange(step * 40, step * 40 + int(rng.integers(1, 40))) * 2 + me
            index.add(rows(ids), ids)
            added[me].update(ids.tolist())
            alive = sorted(added[me] - removed[me])
            gone = rng.choice(alive, len(alive) // 8, replace=False)
            leaving[me].update(gone.tolist())
            index.remove(gone)
            removed[me].update(gone.tolist())
            if step % 30 == 29:
                index.compact()

    def read(seed: int) -> None:
        rng = np.random.default_rng(seed)
        while not stop.is_set():
            me = int(rng.integers(2))
            gone, there = set(removed[me]), set(added[me])
            sample = list(there)[:: max(1, len(there) // 20)]
            if not sample:
                continue
            found = index.search(rows(np.array(sample)), 3, exact=bool(rng.integers(2)))
            back = set(found.ids.ravel().tolist()) & gone
            held = index.contains(sample)
            # What is being removed meanwhile may be missing, nothing else.
            lost = [i for i, held in zip(sample, held, strict=True) if not held and i not in leaving[me]]
            if back or lost:
                problems.append((back, lost))
                return

    readers = [threading.Thread(target=read, args=(seed,)) for seed in range(3)]
    writers = [threading.Thread(target=write, args=(me,)) for me in range(2)]
    for thread in readers + writers:
        thread.start()
    for writer in writers:
        writer.join()
    stop.set()
    for reader in readers:
        reader.join()
    assert not problems, problems[:2]
    index.validate()
    alive = (added[0] - removed[0]) | (added[1] - removed[1])
    assert len(index) == len(alive)
    assert index.contains(sorted(alive)).all()
    np.testing.assert_allclose(index.get(sorted(alive)), rows(np.array(sorted(alive))), atol=1e-5)


def test_every_method_runs_beside_every_other(tmp_path):
    index = Index(DIM, threads=2)
    index.add(rows(np.arange(2000)))
    stop, problems = threading.Event(), []
    path = tmp_path / "index.ice"
    index.save(path)
    calls = [
        lambda: index.add(rows(np.arange(30)), np.arange(30), on_conflict="replace"),
        lambda: index.remove(np.arange(100, 140)),
        lambda: index.add(rows(np.arange(100, 140)), np.arange(100, 140), on_conflict="skip"),
        lambda: index.search(row(1), 5, filter=np.arange(50)),
        lambda: index.range_search(row(1), -1.0),
        lambda: index.search_pages(row(1), 3),
        lambda: index.snapshot().validate(),
        lambda: index.copy().add(row(5)),
        lambda: Index.from_bytes(index.to_bytes()).validate(),
        lambda: (index.save(path), Index.load(path, mmap=True).search(row(1), 3)),
        lambda: (index.stats(), index.nbytes(), index.mean, len(index), index.pages()),
        lambda: index.get(np.arange(500, 600)),
        lambda: index.compact(),
    ]

    def run(call) -> None:
        try:
            while not stop.is_set():
                call()
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=run, args=(call,)) for call in calls]
    for thread in threads:
        thread.start()
    time.sleep(3)
    stop.set()
    for thread in threads:
        thread.join()
    assert not problems, problems[:2]
    index.validate()
    assert len(index) in (1960, 2000)


@pytest.mark.parametrize("call", ["add", "search", "compact"])
def test_other_threads_run_while_the_core_works(call):
    """A thread that counts gets on while a long call runs: the GIL is not held."""
    data = np.random.default_rng(0).standard_normal((30_000, 64), dtype=np.float32)
    index = Index.build(data, threads=1)
    calls = {
        "add": lambda: Index(64, threads=1).add(data),
        "search": lambda: index.search(data[:1000], 10, exact=True, threads=1),
        "compact": lambda: index.compact(threads=1),
    }
    working = threading.Event()
    done = threading.Event()

    def work() -> None:
        working.set()
        calls[call]()
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    working.wait()
    steps = 0
    while not done.is_set():
        steps += 1
        time.sleep(0)
    thread.join()
    # With the GIL held throughout, the counter would stand still for the whole call.
    assert steps > 100
