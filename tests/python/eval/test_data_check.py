"""`icecache eval data check`: what is there, what is broken and where, what is missing."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from icecache.cli import main
from icecache.eval.check import OFFICIAL, check_data

FIXTURES = Path(__file__).parents[2] / "fixtures"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Both fixtures, and RULER's files with a few rows."""
    shutil.copytree(FIXTURES / "longbench", tmp_path, dirs_exist_ok=True)
    shutil.copytree(FIXTURES / "gsm8k", tmp_path / "gsm8k")
    (tmp_path / "PaulGrahamEssays.json").write_text(json.dumps({"text": "A sentence. " * 9}))
    entry = {"question": "?", "answers": [{"text": "a"}], "is_impossible": False}
    (tmp_path / "squad.json").write_text(json.dumps({"data": [{"paragraphs": [{"context": "c", "qas": [entry]}]}]}))
    return tmp_path


def test_every_file_is_counted_and_hashed(folder: Path) -> None:
    found = {(f.suite, f.name): f for f in check_data(folder)}
    assert len(found) == len(OFFICIAL) == 26
    assert {f.status for key, f in found.items() if key[0] == "longbench"} == {"other count"}
    assert found["ruler", "essays"].status == "ok"
    assert found["ruler", "squad"].count == 1
    assert found["ruler", "hotpotqa"].status == "missing"
    gsm8k = found["gsm8k", "test"]
    assert (gsm8k.count, gsm8k.expected, gsm8k.path) == (8, 1319, "gsm8k/test.jsonl")
    sha = hashlib.sha256((folder / "gsm8k" / "test.jsonl").read_bytes()).hexdigest()
    assert gsm8k.hashes == (("gsm8k/test.jsonl", sha),)


def test_the_official_number_of_rows_is_ok(folder: Path) -> None:
    line = (FIXTURES / "longbench" / "data" / "multifieldqa_en.jsonl").read_text(encoding="utf-8").splitlines()[0]
    (folder / "data" / "multifieldqa_en.jsonl").write_text(f"{line}\n" * 150, encoding="utf-8")
    assert {f.name: f for f in check_data(folder)}["multifieldqa_en"].status == "ok"


def test_all_errors_of_a_file_are_listed_with_their_lines(folder: Path) -> None:
    good = (folder / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    lines = [good[0], "{oops", good[1], '{"question": 3}', "", "[]"]
    (folder / "gsm8k" / "test.jsonl").write_text("\n".join(lines), encoding="utf-8")
    finding = {(f.suite, f.name): f for f in check_data(folder)}["gsm8k", "test"]
    assert (finding.status, finding.count, finding.n_errors) == ("broken", 2, 3)
    assert [error.split("test.jsonl:")[1].split(":")[0] for error in finding.errors] == ["2", "4", "6"]


def test_a_file_that_is_no_text_is_broken(folder: Path) -> None:
    (folder / "data" / "qasper.jsonl").write_bytes(b"\xff\xfe\x00")
    (folder / "PaulGrahamEssays.json").write_text("[]")
    found = {f.name: f for f in check_data(folder)}
    assert found["qasper"].status == found["essays"].status == "broken"
    assert "not UTF-8" in found["qasper"].errors[0]


def test_the_command_fails_for_broken_and_for_no_files(folder: Path, tmp_path_factory, capsys) -> None:
    assert main(["eval", "data", "check", str(folder)]) == 0
    assert "1 ok, 23 other count, 0 broken, 2 missing" in capsys.readouterr().out
    (folder / "data" / "qasper.jsonl").write_text("{}", encoding="utf-8")
    assert main(["eval", "data", "check", str(folder)]) == 1
    assert "qasper.jsonl:1: field 'context' must be text" in capsys.readouterr().out
    assert main(["eval", "data", "check", str(tmp_path_factory.mktemp("empty"))]) == 1
    assert main(["eval", "data", "check", str(folder / "nowhere")]) == 1
    assert "must be a folder" in capsys.readouterr().err
