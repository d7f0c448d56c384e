"""Models together: every task of every model counts once, and a claim needs the pooled interval."""

from __future__ import annotations

import gzip

import pytest
from icecache.errors import ConfigError, DataError
from icecache.eval.folder import SAMPLES, RunFolder
from icecache.eval.pool import pool
from icecache.eval.record import ArmStats, Manifest, Record, RunPart

PART = RunPart("icecache eval run", "2026-11-30T15:00:00+00:00", "abc", {"torch": "2"}, {"device": "cpu"})
SCORES = ArmStats(100.0, 100.0, 1, 1, 0.5, 1.0, 0.01, generated_kept="all")


def _folder(path, model, rights, n, tasks=("kv", "vt")):
    """Save a run where each arm got the first so many of `n` answers of every task right."""
    with RunFolder(path, Manifest({"model": model}, {}, {}, {}, (PART,)), resume=False) as run:
        for task in tasks:
            for arm, right in rights.items():
                budget = int(arm.partition("@")[2] or 0) or None
                run.add(
                    Record(
                        *("needle", task, f"s{i}", arm, "B", f"h{i}"),
                        *(9, 1, "x", ("x",), float(i < right), budget, 0, SCORES, {}, {"length": 1024}),
                    )
                    for i in range(n)
                )
    return path


def _row(text, arm):
    lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines())
    return next(cells for cells in lines if cells[0] == arm)


def test_no_model_shows_alone_what_they_show_together(tmp_path):
    rights = {"full": 150, "random@256": 0, "icecache@256": 150, "quest@256": 75}
    folders = [_folder(tmp_path / name, name, rights, 150) for name in "abc"]
    alone, together = pool(folders[:1]), pool(folders)
    assert _row(alone, "icecache@256")[1:4] == ["1", "2", "300"]
    assert _row(alone, "icecache@256")[8] == "≥ 0.97"
    models, tasks, n, full, arm, _, ratio, claim, only, lead = _row(together, "icecache@256")[1:]
    assert (models, tasks, n, full, arm, claim, only, lead) == (
        *("3", "6", "900", "100.0", "100.0", "≥ 0.99", "0 / 0", "-"),
    )
    assert ratio.startswith("1.000 [0.99")
    assert _row(together, "quest@256")[5:6] == ["50.0"]
    assert _row(together, "quest@256")[10].startswith("+50.0 [+")


def test_a_small_run_weighs_as_much_as_a_large_one(tmp_path):
    large = _folder(tmp_path / "large", "a", {"full": 100, "random@64": 0, "icecache@64": 100}, 100)
    small = _folder(tmp_path / "small", "b", {"full": 10, "random@64": 0, "icecache@64": 5}, 10)
    assert _row(pool([large, small]), "icecache@64")[5] == "75.0"


def test_what_does_not_discriminate_in_one_model_counts_in_the_other(tmp_path):
    easy = _folder(tmp_path / "a", "a", {"full": 10, "random@64": 10, "icecache@64": 10}, 10)
    hard = _folder(tmp_path / "b", "b", {"full": 10, "random@64": 0, "icecache@64": 4}, 10)
    assert _row(pool([easy, hard]), "icecache@64")[1:6] == ["1", "2", "20", "100.0", "40.0"]


def test_compressed_records_are_read(tmp_path):
    folder = _folder(tmp_path / "a", "a", {"full": 4, "icecache@64": 4}, 4)
    plain = (folder / SAMPLES).read_bytes()
    text = pool([folder])
    (folder / f"{SAMPLES}.gz").write_bytes(gzip.compress(plain))
    (folder / SAMPLES).unlink()
    assert pool([folder]) == text


def test_runs_that_cannot_be_pooled_are_refused_with_what_is_wrong(tmp_path):
    one = _folder(tmp_path / "a", "a", {"full": 4, "icecache@64": 4}, 4)
    again = _folder(tmp_path / "again", "a", {"full": 4}, 4)
    with pytest.raises(ConfigError, match="one folder a model, got several of a"):
        pool([one, again])
    with pytest.raises(ConfigError, match="must be among full, icecache@64, got quest@64"):
        pool([one], ["quest@64"])
    with pytest.raises(DataError, match="nothing can be paired"):
        pool([again])
