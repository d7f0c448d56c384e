"""Pins of the needle tasks: weights were trained on exactly these words, forms and shares."""

from __future__ import annotations

import hashlib
import json

import pytest
from icecache.eval.needle import TASKS, load_needle, make_samples, needle_path
from icecache.eval.needle.vocabulary import (
    BOS,
    EOS,
    PAD,
    STOP,
    TOKEN_ID,
    VOCABULARY,
    build_tokenizer,
    text_of,
    token_ids,
    vocabulary_hash,
)

# For seed 11 and 512 tokens: the needle that comes first, question and answer of row 0, and a hash of three rows.
PINNED = {
    "passkey": (
        "the pass key is 4 7 9 9 6 . remember it . 4 7 9 9 6 is the pass key .",
        "question : what is the pass key ? the pass key is",
        "4 7 9 9 6",
        "334bbfe49db30414",
    ),
    "kv32": (
        "the special magic number for keen lizard is : 7 2 7 0 4 .",
        "question : what is the special magic number for keen lizard ? the special magic number for keen lizard is :",
        "7 2 7 0 4",
        "9ff27643855710d2",
    ),
    "kv_dense": (
        "the special magic number for wise otter is : 0 7 8 8 0 .",
        "question : what is the special magic number for wise otter ? the special magic number for wise otter is :",
        "0 7 8 8 0",
        "bc78b33dd04b3334",
    ),
    "kv_rand": (
        "ivory dust does dome wheat donkey Y 4 0 7 8 8 0 9 .",
        "question : ivory dust does dome wheat donkey Y",
        "4 0 7 8 8 0 9",
        "04633d38172ae679",
    ),
    "vt3": (
        "var N O = 2 5 4 1 6 .",
        "question : var N U =",
        "var M G = var N O = 2 5 4 1 6",
        "21c1043d56d7c62b",
    ),
    "gsm": (
        "start abe has 6 0 pens .",
        "question : how many pens does abe have after day 4 ? answer : start abe has",
        "6 0 . day 1 abe loses 8 : 6 0 - 8 = 5 2 . day 2 abe gets 2 : 5 2 + 2 = 5 4 . "
        "day 3 abe drops 8 : 5 4 - 8 = 4 6 . day 4 abe sells 6 : 4 6 - 6 = 4 0 . total 4 0",
        "85018c49c9b55724",
    ),
    "chase8": (
        "from basket go to jolly .",
        "question : start ivory .",
        "hop 0 1 : saddle . hop 0 2 : ladder . hop 0 3 : sunny . hop 0 4 : rustic . hop 0 5 : xylem . "
        "hop 0 6 : basket . hop 0 7 : jolly . hop 0 8 : proud . recall hop 0 1 : saddle",
        "6938a81375c82114",
    ),
    "fwe": (
        "",
        "question : the most frequent words are :",
        "saddle ladder sunny",
        "fb6947d32d8d7dac",
    ),
    "mqar": (
        "sunny antler",
        "sunny",
        "antler",
        "bb744c02713dde0a",
    ),
    "induct": (
        "sunny brisk modern radish cactus candle icy walnut windy temple bold sailor minor cactus quarry cosmic wise "
        "lunar hammer almond",
        "sunny brisk",
        "modern radish cactus candle icy walnut windy temple bold sailor minor cactus quarry cosmic wise lunar hammer "
        "almond",
        "96e12bf5faae7e69",
    ),
}


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_gives_the_pinned_rows(task: str) -> None:
    samples = make_samples(task, 512, 3, seed=11, rows_per_seed=3)
    first = samples[0]
    needle = text_of(first.context[slice(*first.evidence[0])]) if first.evidence else ""
    rows = [(sample.context, sample.question, sample.answer) for sample in samples]
    digest = hashlib.sha256(repr(rows).encode()).hexdigest()[:16]
    assert (needle, text_of(first.question), text_of(first.answer), digest) == PINNED[task]


def test_the_vocabulary_is_the_one_the_weights_were_trained_with() -> None:
    assert vocabulary_hash() == "b2852272c232d171ebecb82afa072d81d530aa87c84dde981b6f69c83cd76850"
    assert len(set(VOCABULARY)) == len(VOCABULARY) == 768
    assert (PAD, BOS, EOS, TOKEN_ID["0"], STOP) == (0, 1, 2, 4, 14)


def test_words_and_token_ids_are_inverse() -> None:
    everything = range(len(VOCABULARY))
    assert token_ids(text_of(everything)) == list(everything)
    with pytest.raises(KeyError, match="elephant"):
        token_ids("the elephant")


def test_the_shipped_tokenizer_reads_prompts_back_to_their_token_ids() -> None:
    _, tokenizer = load_needle()
    for task in TASKS:
        sample = make_samples(task, 256, 1, seed=3)[0]
        tokens = [*sample.prompt, *sample.answer]
        assert tokenizer(text_of(tokens), add_special_tokens=False).input_ids == tokens, task
        assert tokenizer(tokenizer.decode(tokens)).input_ids == tokens, task


def test_the_tokenizer_splits_digits_and_marks_and_knows_what_it_does_not_know() -> None:
    for tokenizer in (load_needle()[1], build_tokenizer()):
        assert tokenizer.convert_ids_to_tokens(tokenizer("code=12.?").input_ids) == ["code", "=", "1", "2", ".", "?"]
        assert tokenizer("elephant").input_ids == [tokenizer.unk_token_id] == [3]


def test_the_tokenizer_class_is_spelled_for_every_supported_version_of_transformers() -> None:
    settings = json.loads((needle_path() / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
