"""Every suite runs end to end on local files with the shipped model. Its scores are plumbing: they mean nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from icecache.errors import ConfigError
from icecache.eval.folder import read_manifest, read_records
from icecache.eval.options import EvalOptions
from icecache.eval.run import run_eval
from icecache.eval.suites import SUITES, with_protocol

FIXTURES = Path(__file__).parents[2] / "fixtures"


@pytest.mark.parametrize(
    ("suite", "tasks", "lengths", "folder", "hashed"),
    [
        ("ruler-offline", ("ruler_fwe",), (1024,), None, set()),
        ("longbench", ("trec", "lcc"), (200,), "longbench", {"data/trec.jsonl", "data/lcc.jsonl"}),
        ("gsm8k", ("gsm8k_cot",), (), "gsm8k", {"test.jsonl"}),
    ],
)
def test_a_suite_runs_on_local_files(suite, tasks, lengths, folder, hashed, tmp_path: Path) -> None:
    options = EvalOptions(
        out=tmp_path / "run",
        suite=(suite,),
        tasks=tasks,
        lengths=lengths,
        data_dir=FIXTURES / folder if folder else None,
        policies=("icecache",),
        budgets=(64,),
        controls=("full",),
        limit=1,
    )
    run_eval(options)
    records = read_records(options.out)
    assert {(r.task, r.arm) for r in records} == {(task, arm) for task in tasks for arm in ("full", "icecache@64")}
    assert all(0 <= r.score <= 1 and r.n_generated > 0 for r in records)
    assert set(read_manifest(options.out).data) == hashed


def test_names_of_tasks_are_unique_over_all_suites() -> None:
    by_name = {}
    for suite in SUITES.values():
        for task in suite.tasks:
            assert by_name.setdefault(task.name, task) == task
            assert task.suite in SUITES
    assert len(by_name) > 80


def test_a_protocol_picks_the_variant_of_a_suite_where_there_is_one() -> None:
    assert with_protocol(("needle", "longbench", "gsm8k"), "authors") == (
        "needle",
        "longbench-authors",
        "gsm8k-authors",
    )
    assert with_protocol(("longbench", "gsm8k"), "clean") == ("longbench-clean", "gsm8k")
    assert with_protocol(("longbench",), "official") == ("longbench",)
    with pytest.raises(ConfigError, match="--protocol must be one of official, authors, clean"):
        with_protocol(("longbench",), "best")
