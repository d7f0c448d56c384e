"""Report of the peer benchmark: verdicts follow from the figures, whichever way they fall."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from ann import plot, report, summary
from ann.summary import Row
from ann.verdicts import ANY_PEER, Target, judge


def point(k: int, recall: float, us: float, *, default: bool = False) -> dict[str, float]:
    return {"k": k, "recall": recall, "batch_us": us, "single_us": us, "pair_us": us, "default": default}


def row(data: str, peer: str, us: float, **figures: object) -> Row:
    points = [point(10, 0.96, us, default=True), point(10, 0.5, us / 4), point(100, 0.97, 2 * us)]
    return Row(data, peer, end="done", n=100, points=points, **figures)  # type: ignore[arg-type]


def verdict(rows: list[Row], what: str, rival: str = "", k: int = 10):
    (found,) = [v for v in judge(rows) if (v.target.what, v.target.rival, v.target.k) == (what, rival, k)]
    return found


@pytest.mark.parametrize(("theirs", "passed"), [(19.9, False), (20.0, True)])
def test_speed_passes_exactly_from_the_bound_on(theirs: float, passed: bool):
    found = verdict([row("keys36k", "icecache", 10), row("keys36k", "lorann", theirs)], "qps", ANY_PEER)
    assert found.value == pytest.approx(theirs / 10)
    assert found.passed is passed


def test_the_rival_is_the_fastest_of_all_and_never_a_variant_of_ours():
    rows = [
        row("keys36k", peer, us) for peer, us in {"icecache": 10, "icecache_bf16": 1, "scann": 15, "svs": 40}.items()
    ]
    found = verdict(rows, "qps", ANY_PEER)
    assert found.value == pytest.approx(1.5)
    assert "scann" in found.note


def test_interleaved_rounds_come_before_single_runs():
    ours, rival = row("gmm200k", "icecache", 10), row("gmm200k", "hnswlib", 100)
    ours.pairs, rival.pairs = {10: [10.0, 20.0, 10.0]}, {10: [12.0, 20.0, 13.0]}
    found = verdict([ours, rival], "qps", "hnswlib")
    assert (found.value, found.passed) == (pytest.approx(1.2), False)
    assert "1.00 to 1.30 over 3 rounds" in found.note


def test_a_faster_peer_outside_the_interleaved_run_still_counts():
    ours, paired, other = row("keys36k", "icecache", 10), row("keys36k", "lorann", 30), row("keys36k", "scann", 12)
    ours.pairs, paired.pairs = {10: [10.0]}, {10: [40.0]}
    found = verdict([ours, paired, other], "qps", ANY_PEER)
    assert (found.value, found.passed) == (pytest.approx(1.2), False)


def test_a_recall_that_is_not_reached_is_told_apart_from_one_not_tried():
    ours, rival = row("keys36k", "icecache", 10), row("keys36k", "hnswlib_ctr", 10)
    rival.points = [point(10, 0.4, 1.0)]
    assert verdict([ours, rival], "qps", "hnswlib_ctr").passed is True
    rival.end = "cut"
    assert verdict([ours, rival], "qps", "hnswlib_ctr").passed is None
    assert verdict([ours], "qps", "hnswlib_ctr").passed is None
    ours.points, rival.end = [point(10, 0.9, 1.0)], "done"
    assert verdict([ours, rival], "qps", "hnswlib_ctr").passed is False


def test_costs_and_losses_are_judged_from_above():
    good = {"overhead": 48.0, "fresh": {"default": 0.97, ".95": 0.95}, "churned": {"default": 0.96, ".95": 0.96}}
    bad = {"overhead": 48.1, "fresh": {"default": 0.97, ".95": 0.95}, "churned": {"default": 0.97, ".95": 0.93}}
    for figures, passed in ((good, True), (bad, False)):
        rows = [row("minilm32k", "icecache", 10, **figures)]
        assert verdict(rows, "overhead").passed is passed
        assert verdict(rows, "churn").passed is passed
        assert verdict(rows, "default").passed is True
    assert verdict([row("minilm32k", "icecache", 10)], "churn").passed is None


def test_build_and_insertion_are_ratios_of_cpu_time():
    ours = row("keys36k", "icecache", 1, build_cpu_s=2.0, insert_batch_us=1.0)
    rival = row("keys36k", "hnswlib_ctr", 1, build_cpu_s=19.0, insert_batch_us=31.0)
    assert verdict([ours, rival], "build", "hnswlib_ctr").passed is False
    assert verdict([ours, rival], "insert", "hnswlib_ctr").passed is True
    assert verdict([ours, rival], "insert", "hnswlib").passed is None


def test_the_summary_names_the_winner_also_when_it_is_not_us():
    rows = [row("gmm200k", "icecache", 10), row("gmm200k", "scann", 5)]
    line = next(line for line in report.winners(rows) if "recall@10 .95" in line)
    assert "scann" in line
    assert "place 2 of 2" in line


def test_a_structure_that_misses_the_recall_wins_nothing():
    fast = row("gmm200k", "annoy", 1)
    fast.points = [point(10, 0.3, 0.1)]
    lines = report.winners([row("gmm200k", "icecache", 10), row("gmm200k", "scann", 5), fast])
    assert not [line for line in lines if "annoy" in line]


def test_the_front_holds_no_setting_that_another_beats():
    peer = row("gmm200k", "scann", 10)
    peer.points = [point(10, r, us) for r, us in ((0.5, 1), (0.6, 5), (0.7, 2), (0.9, 4), (0.9, 3))]
    assert plot.front(peer, 10) == [(0.5, 1e6), (0.7, 5e5), (0.9, pytest.approx(1e6 / 3))]


def test_the_report_is_written_as_text_json_and_plot(tmp_path: Path):
    events = [
        {"event": "peer", "name": "icecache", "version": "1"},
        {"event": "data", "name": "gmm4k", "n": 7, "digest": "d", "about": "seed 0"},
        {"event": "build", "cpu_s": 1.0, "wall_s": 2.0, "overhead": 13.0},
        {"event": "point", "line": "beam", "effort": 0, **point(10, 0.96, 10.0, default=True)},
        {"event": "point", "line": "beam", "effort": 9, **point(100, 0.9, 10.0)},
        {"event": "failed", "note": "Traceback\nValueError: broke"},
    ]
    (tmp_path / "gmm4k--icecache.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    shown = report.write(tmp_path, tmp_path / "save" / "ann")
    for part in ("gmm4k: 7 vectors", "seed 0", "TARGETS", "pass", "failed ValueError: broke"):
        assert part in shown
    assert (tmp_path / "save" / "ann.txt").read_text().strip() == shown.strip()
    saved = json.loads((tmp_path / "save" / "ann.json").read_text())
    assert saved["rows"][0]["points"][0]["recall"] == 0.96
    assert (tmp_path / "save" / "ann.svg").read_text().lstrip().startswith("<?xml")
    assert summary.load(tmp_path)[0].overhead == 13.0


def test_an_empty_folder_is_an_error_and_not_an_empty_report(tmp_path: Path):
    with pytest.raises(ValueError, match="expected measurements"):
        report.write(tmp_path, None)


def test_targets_are_known_for_each_data_set():
    kinds = {target.what for target in (v.target for v in judge([row("keys300k", "icecache", 1)]))}
    assert kinds == {"qps", "build", "insert", "default", "churn", "overhead"}
    assert isinstance(judge([row("minilm32k", "icecache", 1)])[0].target, Target)
