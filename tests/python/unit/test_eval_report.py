"""Reports say what the records say: controls, what is left out of averages, and no claim without its interval."""

from __future__ import annotations

from dataclasses import replace

import pytest
from icecache.errors import ConfigError, DataError
from icecache.eval.compare import compare
from icecache.eval.equal import Stand, stand_in
from icecache.eval.folder import RunFolder
from icecache.eval.record import ArmStats, Manifest, Record, RunPart
from icecache.eval.report import sections, write_report
from icecache.eval.results import Results

PART = RunPart("icecache eval run --out r", "2026-11-24T15:00:00+00:00", "abc", {"torch": "2"}, {"device": "cpu"})
MANIFEST = Manifest({"model": "needle-3m"}, {"a.jsonl": "77"}, {"needle": "synthetic"}, {"kv": "EM"}, (PART,))
N = 40


def _records(task, arm, right, *, setup="B", loaded=100.0, prediction=None, length=1024, n=N):
    """`right` of `n` answers right, the first ones."""
    for i in range(n):
        score = float(i < right)
        said = prediction or ("yes" if score else "no")
        budget = int(arm.partition("@")[2] or 0) or None
        stats = ArmStats(loaded, loaded, 1, 1, 0.5, 1.0, 0.01, generated_kept="all")
        meta = {"length": length} if length else {}
        identity = ("needle", task, f"{length}-{i}", arm, setup, f"h{i}")
        yield Record(*identity, 9, 1, said, ("yes",), score, budget, 0, stats, {"strict": score / 2}, meta)


def _run(*groups):
    return Results([record for group in groups for record in group], MANIFEST)


@pytest.fixture
def results():
    arms = {
        "full": 40,
        "exact": 40,
        "full-eager": 39,
        "random@64": 0,
        "icecache@64": 39,
        "quest@64": 20,
        "quest@256": 30,
    }
    loaded = {"icecache@64": 70.0, "quest@64": 150.0, "quest@256": 500.0, "full": 1024.0}
    tasks = [_records("kv", arm, right, loaded=loaded.get(arm, 64.0)) for arm, right in arms.items()]
    easy = [_records("easy", arm, 40 if arm != "random@64" else 37, loaded=loaded.get(arm, 64.0)) for arm in arms]
    return _run(*tasks, *easy)


def _text(results, budget=None):
    return "\n\n".join(sections(results, budget))


def _row(text, *starts):
    """First table row whose first cells are these, behind the summary."""
    for line in text.partition("## Setup")[2].splitlines() or text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[: len(starts)] == list(starts):
            return cells
    raise AssertionError(starts)


def test_a_task_that_random_pages_solve_leaves_the_average(results):
    text = _text(results)
    assert "Not discriminating at 64, left out of its macro: easy." in text
    arm, kv, easy, macro, *_ = _row(text, "icecache@64")
    assert (arm, kv, easy, macro) == ("icecache@64", "97.5", "100.0", "97.5")
    assert "Not known to discriminate at 256 (`random` did not run): kv, easy." in text


def test_a_claim_needs_the_lower_bound_not_the_estimate(results):
    *_, claim, _ = _row(_text(results), "icecache@64")
    assert claim == "not shown"
    for right, shown in [(999, "≥ 0.99"), (985, "≥ 0.97"), (970, "not shown")]:
        arms = {"full": 1000, "random@64": 0, "icecache@64": right}
        many = _run(*(_records("kv", arm, n_right, n=1000) for arm, n_right in arms.items()))
        *_, claim, _ = _row(_text(many), "icecache@64")
        assert claim == shown


def test_every_difference_stands_beside_what_cannot_be_resolved(results):
    row = _row(_text(results), "kv 1024", "B", "quest@64")
    assert row[3:5] == ["40", "50.0"]
    assert row[5].startswith("-50.0 [-6")
    assert row[7] == "20 / 0"
    assert float(row[8]) == pytest.approx(2 * 0.5**20, rel=0.02)
    assert row[9].startswith("< 2")


def test_rivals_are_compared_at_nominal_and_at_equal_load(results):
    text = _text(results)
    rival, loaded, tasks, nominal, equal, _ = _row(text, "quest@256", "500")
    assert (rival, loaded, tasks, equal) == ("quest@256", "500", "1", "icecache@64")
    assert nominal.startswith("+22.5 [+")
    assert _row(text, "quest@64", "150")[3].startswith("+47.5 [+")


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (101.0, Stand("a@1", "a@1", 0.0, 100.0, "equal")),
        (200.0, Stand("a@1", "a@2", 0.5, 200.0, "between")),
        (50.0, Stand("a@1", "a@1", 0.0, 100.0, "more")),
        (900.0, Stand("a@2", "a@2", 0.0, 400.0, "less")),
    ],
)
def test_what_stands_for_a_load_is_an_arm_that_loads_it_or_lies_between_two_or_is_named(target, expected):
    found = stand_in([("a@2", 400.0), ("a@1", 100.0)], target)
    assert (found.below, found.above, found.kind) == (expected.below, expected.above, expected.kind)
    assert found.share == pytest.approx(expected.share)
    assert found.loaded == pytest.approx(expected.loaded)


def test_the_table_at_equal_load_gives_scores_between_arms_and_says_where_there_is_no_arm():
    loads = {"full": 1024.0, "icecache@64": 70.0, "icecache@256": 260.0, "quest@64": 130.0, "quest@256": 520.0}
    right = {"full": 40, "icecache@64": 38, "icecache@256": 40, "quest@64": 10, "quest@256": 30, "random@64": 0}
    arms = [_records("kv", arm, n, loaded=loads.get(arm, 70.5)) for arm, n in right.items()]
    text = _text(_run(*arms)).partition("### At equal load")[2].partition("### ")[0]
    lines = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line.startswith("|")]
    rows = {cells[1]: cells[2:-1] for cells in lines}
    assert rows["rival"] == ["at 70 loaded", "icecache@64 minus it", "at 260 loaded", "icecache@256 minus it"]
    # Half-way between 130 and 520 in the logarithm: 25 and 75 points give 50.
    assert rows["quest"][0] == "25.0 (130)"
    assert rows["quest"][2] == "~50.0"
    assert rows["quest"][1].startswith("+70.0 [")
    assert rows["quest"][3].startswith("+50.0 [")
    assert rows["random"][0] == "0.0"


def test_an_average_over_fewer_tasks_is_marked():
    arms = {"full": 40, "random@64": 0, "icecache@64": 39}
    everywhere = [_records(task, arm, right) for task in ("kv", "vt") for arm, right in arms.items()]
    text = _text(_run(*everywhere, _records("kv", "quest@64", 20)))
    assert _row(text, "quest@64")[3] == "50.0 (1/2)"
    assert _row(text, "icecache@64")[3] == "97.5"


def test_the_noise_floor_excuses_exact_only_as_far_as_it_goes(results):
    assert "1 of 80 answers differ" in _text(results)
    assert "Valid." in _text(results)
    broken = _run(
        *(
            _records("kv", arm, 40, prediction=said)
            for arm, said in [("full", "a"), ("full-eager", "a"), ("exact", "b")]
        )
    )
    assert "**INVALID RUN**" in _text(broken)
    bare = _text(_run(_records("kv", "full", 40)))
    assert "`exact` did not run" in bare
    assert "not measured" in bare


def test_accounting_grades_labels_and_the_command_are_shown(results):
    text = _text(results)
    assert _row(text, "quest@256", "500", "500", "none", "all")
    assert "kv: strict" in text
    assert "Suite `needle` is synthetic." in text
    assert "icecache eval run --out r" in text
    assert "a.jsonl (SHA-256 77)" in text


def test_the_summary_puts_all_setups_and_lengths_side_by_side():
    groups = [("A", 512, 30), ("B", 512, 20), ("B", 2048, 10)]
    records = [
        _records("kv", arm, right if arm != "full" else N, setup=setup, length=length)
        for setup, length, right in groups
        for arm in ("full", "icecache@64")
    ]
    summary = _text(_run(*records)).partition("## Macro averages")[2].partition("## Setup")[0]
    assert "| A 512 " in summary
    (row,) = [line.split("|") for line in summary.splitlines() if line.startswith("| icecache@64")]
    assert [row[i].strip() for i in (2, 4, 6)] == ["75.0", "50.0", "25.0"]


def test_setups_and_lengths_have_tables_of_their_own():
    text = _text(_run(*(_records("kv", "full", 9, setup=s, length=n) for s in "AB" for n in (512, 2048))))
    for name in ("Setup A, 512 tokens", "Setup A, 2,048 tokens", "Setup B, 512 tokens", "Setup B, 2,048 tokens"):
        assert f"## {name}" in text


def _write(path, results):
    with RunFolder(path, MANIFEST, resume=False) as folder:
        folder.add([record for found in results._records.values() for record in found.values()])
    return path


def test_a_report_is_written_to_the_folder_and_can_be_of_one_budget(results, tmp_path):
    folder = _write(tmp_path / "r", results)
    text, written = write_report(folder, budget=64)
    assert written == [folder / "report.md"]
    assert (folder / "report.md").read_text(encoding="utf-8") == text
    assert "quest@64" in text
    with pytest.raises(ConfigError, match="one of 64, 256"):
        write_report(folder, budget=128)
    with pytest.raises(DataError, match="not the folder of a run"):
        write_report(tmp_path)


def test_two_arms_of_a_run_are_compared_pair_by_pair(results, tmp_path):
    folder = _write(tmp_path / "r", results)
    text = compare([folder], ["quest@64", "icecache@64"])
    assert _row(text, "kv")[1:4] == ["40", "50.0", "97.5"]
    assert _row(text, "macro without easy (not discriminating)")[4].startswith("+47.5 [")
    with pytest.raises(ConfigError, match="must name two arms"):
        compare([folder])
    with pytest.raises(ConfigError, match="among full, exact"):
        compare([folder], ["full", "quest@65"])


def test_two_runs_are_compared_in_every_arm_they_share_and_only_on_the_same_prompts(results, tmp_path):
    one = _write(tmp_path / "one", results)
    two = _write(tmp_path / "two", _run(_records("kv", "quest@64", 40), _records("kv", "h2o@64", 40)))
    text = compare([one, two])
    assert text.count("###") == 1
    assert _row(text, "kv")[4].startswith("+50.0")
    other = [replace(r, prompt_sha256="other") for r in _records("kv", "quest@64", 40)]
    with pytest.raises(DataError, match="another prompt"):
        compare([one, _write(tmp_path / "three", Results(other))])
    with pytest.raises(DataError, match="nothing can be paired"):
        compare([one, _write(tmp_path / "four", _run(_records("kv", "full", 1, length=77)))])


def test_one_sample_with_two_prompts_is_refused():
    records = [*_records("kv", "full", 1, n=1), replace(next(_records("kv", "exact", 1, n=1)), prompt_sha256="x")]
    with pytest.raises(DataError, match="two different prompts"):
        Results(records)
