"""Records and manifests survive their files; the needle suite writes what the shipped model was trained on."""

from __future__ import annotations

import json

import pytest
from icecache.errors import ConfigError, DataError
from icecache.eval.needle import load_needle, make_samples
from icecache.eval.needle.suite import ROWS_PER_SEED
from icecache.eval.needle.vocabulary import BOS
from icecache.eval.record import ArmStats, Manifest, Record, RunPart
from icecache.eval.suites import SUITES, choose_tasks
from icecache.eval.task import DataDir, Sample

RECORD = Record(
    suite="needle",
    task="kv32",
    id="512-0-3",
    arm="icecache@64",
    setup="B",
    prompt_sha256="00",
    n_prompt=512,
    n_generated=5,
    prediction="0 8\u2028 é",
    references=("0 8",),
    score=1.0,
    budget=64,
    seed=0,
    stats=ArmStats(70.5, 80.0, 3, 4096, None, 0.5, 0.01, (0, 1), "all", {"tables": 150.0}, 16),
    grades={"flexible": 0.0},
    meta={"length": 512, "depth": 0.25},
)


def test_a_record_is_one_line_and_comes_back_equal():
    line = RECORD.to_json()
    assert "\n" not in line
    assert Record.from_json(line) == RECORD
    assert (RECORD.policy, RECORD.length) == ("icecache", 512)


@pytest.mark.parametrize("change", [{"setup": "C"}, {"score": 1.5}, {"score": None}, {"stats": {}}, {"unknown": 1}])
def test_a_line_that_is_no_record_is_refused(change):
    with pytest.raises(DataError):
        Record.from_json(json.dumps({**json.loads(RECORD.to_json()), **change}))


def test_a_torn_line_is_refused():
    with pytest.raises(DataError, match="not a record"):
        Record.from_json(RECORD.to_json()[:-9])


def test_a_manifest_comes_back_equal_and_another_format_is_refused():
    part = RunPart("icecache eval run", "2026-11-24T15:00:00+00:00", None, {"torch": "2.15"}, {"cores": 2})
    manifest = Manifest({"model": "needle-3m"}, {"a.jsonl": "00"}, {"needle": "synthetic"}, {"kv32": "EM"}, (part,))
    assert Manifest.from_json(manifest.to_json()) == manifest
    with pytest.raises(DataError, match="format"):
        Manifest.from_json(manifest.to_json().replace('"format": 1', '"format": 99'))


def test_the_data_folder_names_what_it_lacks_and_hashes_what_it_gives(tmp_path):
    (tmp_path / "b.jsonl").write_bytes(b"abc")
    data = DataDir(tmp_path)
    assert data.find("a.jsonl", "b.jsonl").name == "b.jsonl"
    assert data.hashes == {"b.jsonl": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"}
    with pytest.raises(DataError, match=r"c\.jsonl"):
        data.find("c.jsonl")
    with pytest.raises(DataError, match="must be a folder"):
        DataDir(tmp_path / "b.jsonl")


def test_a_name_is_one_task_and_unknown_ones_are_refused_with_a_list():
    by_name = {}
    for suite in SUITES.values():
        for task in suite.tasks:
            assert by_name.setdefault(task.name, task) == task
            assert task.suite in SUITES
    every = choose_tasks(tuple(SUITES), tuple(by_name))
    assert [task.name for task in every] == list(by_name)
    defaults = [task.name for task in choose_tasks(tuple(SUITES))]
    assert len(set(defaults)) == len(defaults)
    with pytest.raises(ConfigError, match="needle"):
        choose_tasks(("nothing",))
    with pytest.raises(ConfigError, match="kv32"):
        choose_tasks(("needle",), ("kv33",))
    assert [t.name for t in choose_tasks(("needle",), ("vt3", "kv32"))] == ["vt3", "kv32"]


@pytest.mark.parametrize("task", choose_tasks(("needle",)), ids=lambda t: t.name)
def test_the_needle_suite_as_text_gives_the_very_tokens_of_the_task(task):
    tokenizer = load_needle()[1]
    texts: list[Sample] = list(task.samples(tokenizer, length=512, n=3, seed=0, data=None))
    for drawn, text in zip(make_samples(task.name, 512, 3, 0, ROWS_PER_SEED), texts, strict=True):
        assert (BOS, *tokenizer(text.context + text.question)["input_ids"]) == drawn.prompt
        assert task.score(tokenizer.decode(drawn.answer), text) == 1.0
        wrong = (*drawn.answer[:-1], drawn.answer[-1] ^ 1)
        assert task.score(tokenizer.decode(wrong), text) == 0.0
        assert text.max_new_tokens + sum(t.max_new_tokens for t in text.turns) == drawn.given.count(False)
