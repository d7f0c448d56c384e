"""Runner of the peer benchmark, with ours and brute force on a tiny set."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ann import cell, datasets, pairs, runner, streaming, summary
from ann.options import Options
from ann.peers import PEERS
from ann.peers.base import Augmented, Centred
from ann.peers.brute_peer import Brute
from ann.peers.icecache_peer import IceCache

DATA = "keys4k"


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> Options:
    cache = tmp_path_factory.mktemp("cache")
    datasets.store(DATA, datasets.keys(640, n_queries=24, n_extra=64), cache)
    return Options(cache=cache, out=tmp_path_factory.mktemp("out"), repeats=1, build_threads=1)


@pytest.fixture(autouse=True)
def _keep_environment():
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def test_a_cell_holds_everything_and_a_second_run_keeps_it(options: Options):
    said: list[str] = []
    cells = [(DATA, "icecache"), (DATA, "brute")]
    runner.run_all(cells, options, said.append)
    assert all(": done in" in line for line in said), said
    for row in summary.load(options.out):
        assert row.end == "done"
        assert row.n == 640
        assert row.highest_recall(10) == 1.0
        assert row.build_cpu_s is not None
        assert min(row.qps(10, 0.95) or 0, row.qps(100, 0.95) or 0, row.qps(10, 0.95, "single_us") or 0) > 0
        assert min(row.insert_single_us or 0, row.insert_batch_us or 0, row.remove_single_us or 0) > 0
        assert set(row.fresh) == set(row.churned) == {"default", ".95"}
    before = {file.name: file.read_text() for file in options.out.glob("*.jsonl")}
    said.clear()
    runner.run_all(cells, options, said.append)
    assert all(line.endswith("kept") for line in said)
    assert before == {file.name: file.read_text() for file in options.out.glob("*.jsonl")}


def test_a_cell_that_was_cut_short_is_measured_again(options: Options, tmp_path: Path):
    options = replace(options, out=tmp_path)
    file = cell.path(tmp_path, DATA, "brute")
    file.write_text('{"event": "build", "cpu_s": 99}\n{"event": "poi')
    assert runner.read(file) == [{"event": "build", "cpu_s": 99}]
    assert not runner.ended(file)
    runner.run_all([(DATA, "brute")], options, lambda _: None)
    assert runner.ended(file)
    assert summary.row(file).build_cpu_s != 99


def test_a_process_that_is_killed_ends_its_cell_and_not_the_run(options: Options, tmp_path: Path):
    options = replace(options, out=tmp_path, wall_s=1, repeats=10**9)
    said: list[str] = []
    runner.run_all([(DATA, "brute")], options, said.append)
    assert "killed" in said[0]
    assert runner.ended(cell.path(tmp_path, DATA, "brute"))


def test_a_library_that_is_absent_is_skipped_with_a_note_and_tried_again(options: Options, monkeypatch):
    monkeypatch.setitem(PEERS, "ghost", replace(PEERS["brute"], module="no_such_peer"))
    cell.run("ghost", DATA, options)
    row = summary.row(cell.path(options.out, DATA, "ghost"))
    assert (row.end, "no_such_peer" in row.note) == ("absent", True)
    assert not runner.ended(cell.path(options.out, DATA, "ghost"))
    cell.path(options.out, DATA, "ghost").unlink()


def test_a_spent_budget_is_written_down_as_a_cut(options: Options):
    data = datasets.load(DATA, options.cache)
    events = list(cell.measure(Brute(), data, replace(options, cpu_s=0.0)))
    assert events[-1]["event"] == "cut"
    assert not [event for event in events if event["event"] in ("insert", "churn")]


def test_peers_run_only_where_their_metric_applies():
    cells = runner.plan(["a", "b"], ["icecache", "hnswlib_ctr"], {"a": "ip", "b": "l2"})
    assert cells == [("a", "icecache"), ("a", "hnswlib_ctr"), ("b", "icecache")]


@pytest.mark.parametrize("wrap", [Centred, Augmented])
def test_centring_and_augmenting_keep_the_inner_product_ranking(options: Options, wrap: type[Centred]):
    data = datasets.load(DATA, options.cache)
    peer = wrap(Brute())
    peer.build(data.base[:600], "ip", 1)
    peer.add(np.arange(600, 640), np.array(data.base[600:]))
    found = peer.search(data.queries, 10)
    assert (found == data.truth[:, :10]).mean() > 0.98


def test_interleaved_peers_take_the_same_number_of_turns(options: Options):
    pairs.run_all([(DATA, "icecache"), (DATA, "brute")], options, 2, lambda _: None)
    lines = [json.loads(line) for line in pairs.path(options.out, DATA).read_text().splitlines()]
    assert {(line["peer"], line["k"]) for line in lines} == {(p, k) for p in ("icecache", "brute") for k in (10, 100)}
    assert all(len(line["us"]) == 2 and min(line["us"]) > 0 and line["recall"] >= 0.95 for line in lines)


def test_a_runbook_inserts_what_it_deletes_and_ours_follows_it(options: Options):
    data = datasets.load(DATA, options.cache)
    order, sizes = streaming.by_cluster(data.base, 0)
    assert np.array_equal(np.sort(order), np.arange(640))
    books = {
        "sliding": (data.base, streaming.sliding(640)),
        "clustered": (data.base[order], streaming.clustered(sizes)),
    }
    for rows, steps in books.values():
        live: set[int] = set()
        for step in steps:
            span = set(range(step.start, step.end))
            if step.operation == "insert":
                assert not live & span
                live |= span
            elif step.operation == "delete":
                assert span <= live
                live -= span
        assert live
        exact = streaming.play(Brute(), data, np.array(rows), steps)
        ours = streaming.play(IceCache(), data, np.array(rows), steps)
        assert exact["recall"] == 1.0
        assert ours["recall"] > 0.9  # type: ignore[operator]


def test_a_runbook_is_written_in_the_form_of_the_streaming_track():
    steps = [streaming.Step("insert", 0, 5), streaming.Step("search")]
    expected = (
        'book:\n  max_pts: 5\n  1:\n    operation: "insert"\n    start: 0\n    end: 5\n  2:\n    operation: "search"\n'
    )
    assert streaming.yaml("book", steps, 5) == expected
