"""Answers end where they should, given turns are fed, and the batch loop says what `generate` says."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from icecache.eval.greedy import Row, answer_greedily, end_tokens
from icecache.eval.needle import load_needle
from icecache.eval.needle.vocabulary import EOS, token_ids
from icecache.eval.prefill import prefill
from icecache.eval.render import prepare
from icecache.eval.suites import choose_tasks
from icecache.eval.task import Sample, Turn

SAMPLE = Sample("t", "0", "the sun is yellow .", " what is the sun ?", ("yellow",), 3)


@pytest.fixture(scope="module")
def loaded():
    return load_needle()


def _feed(loaded, sample, words):
    """What a row feeds when the model predicts `words` one after the other."""
    row, fed = Row(prepare(sample, loaded[1]), loaded[1], frozenset({EOS})), []
    for token in token_ids(words):
        fed.append(row.push(token))
        if row.is_over:
            break
    return row, fed


def test_an_answer_ends_after_its_most_tokens(loaded):
    row, fed = _feed(loaded, SAMPLE, "green is it not")
    assert (row.is_over, row.answer().text, row.answer().n_generated) == (True, "green is it", 3)
    assert len(fed) == 3


def test_the_end_of_the_sequence_ends_it_and_is_not_part_of_it(loaded):
    row, _ = _feed(loaded, SAMPLE, "sun <eos> sky")
    assert row.is_over
    assert (row.answer().text, row.answer().n_generated) == ("sun", 1)


def test_a_stop_string_ends_it_and_is_cut_off(loaded):
    row, fed = _feed(loaded, replace(SAMPLE, stop=(" .",), max_new_tokens=9), "sun sky . green")
    assert row.is_over
    assert len(fed) == 3
    assert row.answer().text == "sun sky"


def test_ends_are_forbidden_while_an_answer_is_too_short(loaded):
    row, _ = _feed(loaded, replace(SAMPLE, min_new_tokens=2, stop=(".",)), "sun")
    assert row.forbidden() == {EOS, *token_ids(".")}
    row, _ = _feed(loaded, replace(SAMPLE, min_new_tokens=2, stop=(".",)), "sun sky")
    assert row.forbidden() == frozenset()


def test_a_given_turn_is_fed_whatever_the_model_predicts(loaded):
    sample = replace(SAMPLE, max_new_tokens=1, turns=(Turn("and the sky ?", 2),))
    row, fed = _feed(loaded, sample, "yellow green green green green blue sky")
    assert fed == token_ids("yellow and the sky ? blue sky")
    assert row.is_over
    assert row.answer().text == "yellow and the sky ? blue sky"
    assert row.answer().n_generated == 3
    early, fed = _feed(loaded, replace(sample, max_new_tokens=5), "<eos> green green green blue sky")
    assert fed == token_ids("and the sky ? blue sky")
    assert early.is_over


@pytest.mark.parametrize("setup", ["A", "B"])
@pytest.mark.parametrize("name", ["vt3", "chase8"])
def test_the_loop_says_what_generate_says(loaded, name, setup):
    model, tokenizer = loaded
    (task,) = choose_tasks(("needle",), (name,))
    prompts = [prepare(s, tokenizer) for s in task.samples(tokenizer, length=384, n=3, seed=1, data=None)]
    prefilled = prefill(model, prompts, setup)
    answers, timing = answer_greedily(model, tokenizer, prompts, prefilled.cache, setup)
    assert timing.first_s > 0
    for prompt, answer in zip(prompts, answers, strict=True):
        sample = prompt.sample
        ids = torch.tensor([[*prompt.context, *prompt.question]])
        produced = model.generate(ids, do_sample=False, max_new_tokens=sample.max_new_tokens)[0, ids.shape[1] :]
        assert answer.tokens[: sample.max_new_tokens] == tuple(produced.tolist())
        assert task.score(answer.text, sample) == 1.0


def test_ends_come_from_the_generation_config_and_the_tokenizer(loaded):
    model, tokenizer = loaded
    assert EOS in end_tokens(model, tokenizer)
