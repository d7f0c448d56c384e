"""Context and question keep their tokens and their boundary, with and without a chat template."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
from icecache.errors import DataError
from icecache.eval.needle import load_needle
from icecache.eval.needle.vocabulary import BOS, token_ids
from icecache.eval.render import BOUNDARY, encode, prepare, render
from icecache.eval.task import Sample, Turn

SAMPLE = Sample("t", "0", "the sun is yellow .", " what is the sun ?", ("yellow",), 2)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %} {{ m['role'][0] | upper }} {{ m['content'] }} |{% endfor %}"
    "{% if add_generation_prompt %} A{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return load_needle()[1]


@pytest.fixture(scope="module")
def chatting(tokenizer):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = TEMPLATE
    return changed


def test_a_prompt_is_its_parts_behind_one_bos(tokenizer):
    prompt = prepare(SAMPLE, tokenizer)
    assert prompt.context == (BOS, *token_ids("the sun is yellow ."))
    assert prompt.question == tuple(token_ids("what is the sun ?"))
    assert prompt.bare == (BOS,)
    assert prompt.sample.context == ""


def test_a_template_surrounds_the_parts_and_brings_the_only_bos(chatting):
    prompt = prepare(replace(SAMPLE, answer_prefix=" it is", shots=(("sky ?", "blue"),), system="you"), chatting)
    assert prompt.context == (BOS, *token_ids("S you | U sky ? | A blue | U the sun is yellow ."))
    assert prompt.question == tuple(token_ids("what is the sun ? | A it is"))
    assert prompt.bare == (BOS, *token_ids("S you | U sky ? | A blue | U"))


def test_a_sample_may_refuse_the_template(chatting, tokenizer):
    assert prepare(replace(SAMPLE, chat=False), chatting).context == prepare(SAMPLE, tokenizer).context


def test_the_hash_is_of_the_whole_prompt_wherever_its_boundary(tokenizer):
    moved = replace(SAMPLE, context="the sun is", question=" yellow . what is the sun ?")
    assert render(SAMPLE, tokenizer).sha256 == render(moved, tokenizer).sha256
    assert render(SAMPLE, tokenizer).sha256 != render(replace(SAMPLE, question="?"), tokenizer).sha256


def test_a_token_over_the_boundary_belongs_to_the_question(tokenizer):
    cut = replace(SAMPLE, context="the sun is yel", question="low .")
    context, question = encode(render(cut, tokenizer), tokenizer)
    assert context == (BOS, *token_ids("the sun is"))
    assert question == tuple(token_ids("yellow ."))


def test_given_turns_become_tokens(tokenizer):
    turned = replace(SAMPLE, turns=(Turn("and the sky ?", 3),))
    prompt = prepare(turned, tokenizer)
    assert prompt.turns == (tuple(token_ids("and the sky ?")),)
    assert prompt.n_most == len(prompt.context) + len(prompt.question) + 2 + 4 + 3


def test_what_would_blur_the_boundary_is_refused(tokenizer, chatting):
    with pytest.raises(DataError, match=r"U\+E000"):
        prepare(replace(SAMPLE, context=f"a {BOUNDARY}"), tokenizer)
    with pytest.raises(DataError, match="no token"):
        prepare(replace(SAMPLE, question=" "), tokenizer)
    twice = copy.deepcopy(chatting)
    twice.chat_template = TEMPLATE.replace("{{ m['content'] }}", "{{ m['content'] }} {{ m['content'] }}")
    with pytest.raises(DataError, match="2 times"):
        prepare(SAMPLE, twice)
