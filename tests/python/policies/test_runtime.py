"""Policies inside `generate`: exact with a covering budget, one prefill for all, forks apart, and their costs."""

from __future__ import annotations

import copy

import pytest
import torch
from icecache import CacheStateError, ConfigError, IceConfig, IceRuntime, UnsupportedModelError
from icecache.policies import (
    POLICIES,
    Prefill,
    Quest,
    RenumberedStreaming,
    SnapKV,
    TokenOracle,
    frequencies_of,
    make_policy,
    matched_dense_layers,
    published_dense_layers,
)
from tiny import build, left_padded, prompt
from transformers import DynamicCache

MASKED = [name for name in POLICIES if make_policy(name, IceConfig()).masks is not None]
EXACT = [name for name in POLICIES if name not in ("oracle-sampling", "magicpig")]
"""Policies that attend to everything with a budget that covers the context."""


def generated(model, batch, n_new=16, **kwargs):
    return model.generate(**batch, max_new_tokens=n_new, do_sample=False, **kwargs)


def positions(mask):
    return (mask.cumsum(-1) - 1).clamp(min=0)


def prefilled(model, batch, runtime):
    """A cache with all tokens of a batch but the last."""
    cache, mask = runtime.new_cache(), batch["attention_mask"][:, :-1]
    with torch.no_grad():
        model(batch["input_ids"][:, :-1], attention_mask=mask, position_ids=positions(mask), past_key_values=cache)
    return cache


@pytest.mark.parametrize("policy", EXACT)
def test_a_covering_budget_equals_full_attention_in_a_ragged_batch(policy):
    model, batch = build("llama"), left_padded([150, 90, 20])
    expected = generated(model, batch)
    with IceRuntime.wrap(model, policy=policy, budget=1024, dense_below=0) as runtime:
        assert torch.equal(expected, generated(model, batch))
        stats = runtime.stats()
    mean = (150 + 90 + 20) / 3 + 8
    assert stats.attended_mean == stats.loaded_mean == mean
    assert stats.dense_layers == ((0, 1, 2) if policy == "full" else stats.dense_layers)


@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "streaming"])
def test_one_prefill_serves_every_policy_like_a_prefill_of_its_own_and_stays_as_it_was(policy):
    model, batch = build("llama"), left_padded([260, 200])
    settings = {"policy": policy, "budget": 64, "dense_below": 0}
    with IceRuntime.wrap(model, policy=Prefill(attention=True)) as runtime:
        shared = prefilled(model, batch, runtime)
    with IceRuntime.wrap(model, **settings) as runtime:
        own = generated(model, batch, past_key_values=prefilled(model, batch, runtime))
        of_own = runtime.stats()
    for _ in range(2):
        with IceRuntime.wrap(model, **settings) as runtime:
            cache = runtime.adopt(shared, attention_mask=batch["attention_mask"][:, :-1])
            assert torch.equal(own, generated(model, batch, past_key_values=cache))
            stats = runtime.stats()
        assert (stats.attended_mean, stats.loaded_mean) == (of_own.attended_mean, of_own.loaded_mean)


@pytest.mark.parametrize("policy", MASKED)
def test_forks_do_not_see_each_others_tokens(policy):
    model, batch = build("llama"), left_padded([200, 140])
    with IceRuntime.wrap(model, policy=policy, budget=64, dense_below=0) as runtime:
        cache = prefilled(model, batch, runtime)
        fork = copy.deepcopy(cache)
        first = generated(model, batch, past_key_values=cache)
        other = {**batch, "input_ids": batch["input_ids"].clone()}
        other["input_ids"][:, -1] = 5
        generated(model, other, past_key_values=copy.deepcopy(fork))
        assert torch.equal(first, generated(model, batch, past_key_values=fork))


@pytest.mark.parametrize("policy", [name for name in MASKED if name != "full"])
def test_a_chunk_after_the_prefill_equals_token_by_token_steps_when_it_is_sparse(policy):
    model, batch, question = build("llama"), left_padded([200, 140]), prompt(2, 6, seed=3)
    settings = {"policy": policy, "budget": 64, "dense_below": 0}
    logits = []
    for whole in (True, False):
        with IceRuntime.wrap(model, sparse_prefill=True, **settings) as runtime, torch.no_grad():
            cache = prefilled(model, batch, runtime)
            for piece in [question] if whole else question.split(1, 1):
                mask = torch.ones(2, cache.get_seq_length() + piece.shape[1], dtype=torch.long)
                mask[1, :60] = 0
                at = positions(mask)[:, -piece.shape[1] :]
                out = model(piece, attention_mask=mask, position_ids=at, past_key_values=cache).logits
            logits.append(out[:, -1])
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("policy", [n for n in MASKED if not make_policy(n, IceConfig()).masks.forgets])
def test_a_dense_chunk_belongs_to_the_prompt(policy):
    model, ids = build("llama"), prompt(1, 200)
    expected = generated(model, {"input_ids": ids}, past_key_values=None)
    with IceRuntime.wrap(model, policy=policy, budget=64, dense_below=0) as runtime, torch.no_grad():
        first = generated(model, {"input_ids": ids}, n_new=1)
        runtime.reset_stats()
        cache = runtime.new_cache()
        for piece in ids.split(70, 1):
            logits = model(piece, past_key_values=cache).logits[:, -1]
        assert logits.argmax() == expected[0, 200] == first[0, 200]
        assert all(layer.kept is None or layer.kept.n_prompt == [200] for layer in cache.layers)


def test_policies_that_need_notes_refuse_a_cache_without_them():
    model, ids = build("llama"), prompt(1, 200)
    cache = DynamicCache()
    with torch.no_grad():
        model(ids, past_key_values=cache)
    for policy, missing in [("snapkv", "queries of the last prompt tokens")]:
        with (
            IceRuntime.wrap(model, policy=policy, dense_below=0) as runtime,
            pytest.raises(CacheStateError, match=missing),
        ):
            runtime.adopt(cache)
    with IceRuntime.wrap(model, policy="quest", budget=64, dense_below=0) as runtime:
        generated(model, {"input_ids": ids}, past_key_values=runtime.adopt(cache))


def test_a_cache_of_one_policy_is_not_taken_over_by_another():
    model, ids = build("llama"), prompt(1, 200)
    with IceRuntime.wrap(model, policy="quest", dense_below=0) as runtime, torch.no_grad():
        cache = runtime.new_cache()
        model(ids, past_key_values=cache)
    for other in ("token-oracle", "icecache", Quest(64)):
        with (
            IceRuntime.wrap(model, policy=other, dense_below=0) as runtime,
            pytest.raises(CacheStateError, match="prepared for another policy"),
        ):
            runtime.adopt(cache)


def test_a_cropped_draft_leaves_no_trace():
    model, ids = build("llama"), prompt(1, 200)
    for policy in [name for name in MASKED if name != "full"]:
        outputs = []
        for draft in (False, True):
            with IceRuntime.wrap(model, policy=policy, budget=64, dense_below=0, seed=3) as runtime, torch.no_grad():
                cache = runtime.new_cache()
                model(ids, past_key_values=cache)
                if draft:
                    model(ids[:, :1], past_key_values=cache)
                    cache.crop(-1)
                outputs.append([model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(4)])
        for a, b in zip(*outputs, strict=True):
            assert torch.equal(a, b), policy


def test_beams_follow_their_rows():
    model, ids = build("llama"), prompt(1, 120)
    kwargs = {"max_new_tokens": 12, "num_beams": 3, "do_sample": False}
    expected = model.generate(ids, **kwargs)
    for policy in EXACT:
        with IceRuntime.wrap(model, policy=policy, budget=1024, dense_below=0):
            assert torch.equal(expected, model.generate(ids, **kwargs)), policy


def test_dense_layers_are_listed_and_are_dense():
    model, ids = build("llama"), prompt(1, 200)
    with IceRuntime.wrap(model, policy="quest", budget=64, dense_below=0, dense_layers=(0, 2)) as runtime:
        generated(model, {"input_ids": ids})
        assert runtime.stats().dense_layers == (0, 2)
        assert runtime.layer_plan == ("DynamicLayer", "retrieval", "DynamicLayer")
    assert matched_dense_layers(4) == ()
    assert matched_dense_layers(32) == (0, 1)
    assert published_dense_layers("magicpig", 32) == (0, 16)
    assert published_dense_layers("magicpig", 4) == (0,)
    assert published_dense_layers("snapkv", 32) == ()


def test_the_stated_cost_is_that_of_the_rule():
    model, ids = build("llama"), prompt(1, 400)
    with IceRuntime.wrap(model, policy="snapkv", budget=64, dense_below=0) as runtime:
        generated(model, {"input_ids": ids}, n_new=11)
        stats = runtime.stats()
    assert (stats.attended_min, stats.attended_max) == (65, 74)  # what was kept and 1 to 10 generated tokens
    assert stats.generated_mean == 5.5
    assert stats.generated_kept == "all"
    assert 64 < stats.loaded_mean - 5.5 <= 128  # two query heads, each with its own choice
    with IceRuntime.wrap(model, policy="token-oracle", budget=96, dense_below=0) as runtime:
        generated(model, {"input_ids": ids}, n_new=11)
        stats = runtime.stats()
    assert stats.attended_min == stats.attended_max == stats.loaded_mean == 97


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: SnapKV(32), "window must be"),
        (lambda: SnapKV(64, kernel=4), "kernel must be odd"),
        (lambda: SnapKV(64, pool="median"), "pool must be"),
        (lambda: Quest(0), "at least 1"),
        (lambda: TokenOracle(48), "larger than sink"),
        (lambda: TokenOracle(64, unit="layer"), "unit must be"),
        (lambda: Prefill(last_queries=-1), "last_queries must be"),
    ],
)
def test_bad_settings_are_refused(make, reason):
    with pytest.raises(ConfigError, match=reason):
        make()


def test_renumbering_needs_a_rotary_model_and_leaves_a_covered_context_alone():
    model, ids = build("llama"), prompt(1, 120)
    policy = RenumberedStreaming(1024, frequencies_of(model))
    expected = generated(model, {"input_ids": ids})
    with IceRuntime.wrap(model, policy=policy, budget=1024, dense_below=0) as runtime:
        assert torch.equal(expected, generated(model, {"input_ids": ids}))
        assert runtime.stats().generated_kept == "window"
    with pytest.raises(UnsupportedModelError, match="rotary frequencies"):
        frequencies_of(build("gpt2"))
