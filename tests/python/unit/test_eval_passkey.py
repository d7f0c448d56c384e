"""The passkey prompts have the published form, length and depths, and both gradings grade what they say."""

from __future__ import annotations

import re

import pytest
from icecache.eval.needle import load_needle
from icecache.eval.passkey import FILLER, SUITE, TASK_LINE
from icecache.eval.render import prepare
from icecache.eval.task import Graded

BY_CHARACTERS, BY_TOKENS = SUITE.tasks


@pytest.fixture(scope="module")
def tokenizer():
    return load_needle()[1]


def _samples(task, tokenizer, length=10_240, n=20, seed=0):
    return list(task.samples(tokenizer, length=length, n=n, seed=seed, data=None))


def test_the_filler_is_cut_by_characters_as_published(tokenizer):
    for sample in _samples(BY_CHARACTERS, tokenizer):
        line, before, key, behind, end = sample.context.split("\n")
        assert (line, end) == (TASK_LINE, "")
        assert len(before) + len(behind) == 38_000
        assert (FILLER * 500).startswith(before)
        number = sample.references[0]
        assert key == f"The pass key is {number}. Remember it. {number} is the pass key."
        assert 1 <= int(number) <= 50_000
        assert sample.meta["depth"] == pytest.approx(len(before) / 38_000, abs=1e-3)


def test_twenty_depths_go_from_start_to_end_and_come_again_with_other_numbers(tokenizer):
    samples = _samples(BY_CHARACTERS, tokenizer, 1024, 40)
    depths = [sample.meta["depth"] for sample in samples]
    assert depths[:20] == depths[20:] == sorted(depths[:20])
    assert (depths[0], depths[19]) == (0, 1)
    assert len({sample.references for sample in samples}) > 30
    assert samples == _samples(BY_CHARACTERS, tokenizer, 1024, 40)
    assert samples[:20] != _samples(BY_CHARACTERS, tokenizer, 1024, 20, seed=1)


@pytest.mark.parametrize("length", [512, 4096])
def test_the_filler_is_cut_by_tokens_to_the_length_and_no_longer(tokenizer, length):
    for sample in _samples(BY_TOKENS, tokenizer, length, 5):
        # Within one sentence's tokens of the length; never above it.
        assert length - 24 <= prepare(sample, tokenizer).n_most <= length


def test_a_length_too_short_for_the_prompt_still_asks(tokenizer):
    (sample,) = _samples(BY_TOKENS, tokenizer, 8, 1)
    assert re.search(r"The pass key is \d+\.", sample.context)


@pytest.mark.parametrize(
    ("prediction", "score", "last"),
    [
        (" {n}.", 1, 0),
        (" {n}", 1, 1),
        ("{n}", 1, 1),
        (" 1{n}", 0, 1),
        ("7 {n}", 0, 1),
        ("0{n}", 1, 1),
        ("", 0, 0),
        ("none", 0, 0),
        ("{n}1", 0, 0),
    ],
)
def test_both_gradings(tokenizer, prediction, score, last):
    (sample,) = _samples(BY_CHARACTERS, tokenizer, 256, 1)
    said = prediction.format(n=sample.references[0])
    assert BY_CHARACTERS.score(said, sample) == score
    assert isinstance(BY_CHARACTERS, Graded)
    assert BY_CHARACTERS.grades(said, sample) == {"last tokens": last}
