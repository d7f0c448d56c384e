"""On the shipped model: choosing by true weights answers as full attention does; nearness and chance do not."""

from __future__ import annotations

import pytest
import torch
from icecache import IceRuntime
from icecache.eval.needle import load_needle, make_samples
from icecache.eval.needle.runner import ask
from icecache.policies import Prefill

ROWS, LENGTH, BUDGET = 4, 1024, 64


@pytest.fixture(scope="module")
def scores():
    model, tokenizer = load_needle()
    samples = make_samples("kv32", LENGTH, ROWS, seed=100, rows_per_seed=ROWS)
    contexts = torch.tensor([sample.context for sample in samples])
    found = {}
    with torch.inference_mode():
        with IceRuntime.wrap(model, policy=Prefill()) as runtime:
            prefilled = runtime.new_cache()
            model(contexts, past_key_values=prefilled, logits_to_keep=1)
        for policy in ("full", "token-oracle", "token-oracle-q", "icecache-paper", "streaming", "random"):
            with IceRuntime.wrap(model, policy=policy, budget=BUDGET, dense_below=0) as runtime:
                outcomes = ask(model, tokenizer, samples, runtime.adopt(prefilled))
                found[policy] = sum(o.exact_match for o in outcomes) / ROWS, runtime.stats()
    return found


@pytest.mark.parametrize("policy", ["full", "token-oracle", "token-oracle-q"])
def test_full_attention_and_the_oracles_of_its_tokens_answer_everything(scores, policy):
    assert scores[policy][0] == 1.0


@pytest.mark.parametrize("policy", ["streaming", "random"])
def test_the_budget_alone_is_worth_next_to_nothing(scores, policy):
    assert scores[policy][0] <= 0.25


def test_the_published_index_finds_what_nearness_and_chance_do_not(scores):
    assert scores["icecache-paper"][0] >= 0.5


def test_the_oracle_per_kv_head_reads_its_budget_and_keeps_the_most_mass_of_what_loads_as_much(scores):
    oracle = scores["token-oracle"][1]
    assert oracle.attended_min == oracle.attended_max == oracle.loaded_mean == BUDGET + 1
    assert oracle.mass_kept > scores["icecache-paper"][1].mass_kept
    assert scores["token-oracle-q"][1].mass_kept > oracle.mass_kept
