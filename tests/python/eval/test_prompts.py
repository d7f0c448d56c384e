"""Prompts of the suites with data are those of the golden file: a template that changes by a character is found."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path

import pytest
from icecache.eval.suites import SUITES
from icecache.eval.task import DataDir, Sample

TESTS = Path(__file__).parents[2]
GOLDEN = json.loads((TESTS / "golden" / "eval_prompts.json").read_text(encoding="utf-8"))
HAS_JIEBA = importlib.util.find_spec("jieba") is not None


class Words:
    """A tokenizer that never has to cut."""

    chat_template = None
    name_or_path = ""

    def __call__(self, text: str, **_: object) -> object:
        return type("Encoding", (), {"input_ids": text.split()})


def fingerprint(sample: Sample) -> str:
    text = json.dumps(
        [sample.system, sample.shots, sample.context, sample.question, sample.stop, sample.max_new_tokens]
    )
    return hashlib.sha256(text.encode()).hexdigest()


@pytest.mark.parametrize(("suite", "folder"), [("longbench", "longbench"), ("gsm8k", "gsm8k")])
def test_prompts_are_those_of_the_golden_file(suite: str, folder: str) -> None:
    data = DataDir(TESTS / "fixtures" / folder)
    for task in SUITES[suite].tasks:
        if "jieba" in task.metric and not HAS_JIEBA:
            continue
        samples = task.samples(Words(), length=None, n=3, seed=0, data=data)
        assert [fingerprint(sample) for sample in samples] == GOLDEN[task.name]


def test_the_golden_file_has_every_task() -> None:
    assert set(GOLDEN) == {task.name for suite in ("longbench", "gsm8k") for task in SUITES[suite].tasks}
