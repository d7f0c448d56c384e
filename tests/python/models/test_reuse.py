"""Layers that share pages: the followers of a group attend exactly what its leader has chosen, and nothing is lost.

The reference masks: in float64, attention over the leader's pages, sink and window, of the layer's own keys and values.
"""

from __future__ import annotations

import copy

import pytest
import torch
from icecache import IceRuntime
from icecache.errors import BadTensorError, CacheStateError, ConfigError, UnsupportedModelError
from oracle import check_decode_outputs, watch
from tiny import build, dense_and_ours, left_padded, prompt
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

BUDGET = 112  # four pages beside sink 16 and window 32
SMALL = {"budget": BUDGET, "dense_below": 0, "threads": 1}


def forward(model, ids, cache, **kwargs):
    with torch.no_grad():
        return model(ids, past_key_values=cache, use_cache=True, **kwargs).logits


def deep_model(n_layers=5):
    torch.manual_seed(0)
    size = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": n_layers}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 4096}
    return LlamaForCausalLM(LlamaConfig(**size, **heads, initializer_range=0.3, pad_token_id=0)).eval()


@pytest.mark.parametrize("lengths", [[200], [230, 90, 161]])
@pytest.mark.parametrize(("policy", "reuse"), [("icecache", 2), ("icecache", 3), ("page-oracle", 3), ("random", 3)])
def test_followers_attend_exactly_what_their_leader_has_chosen(monkeypatch, policy, reuse, lengths):
    model, inputs = build("llama"), left_padded(lengths)
    with IceRuntime.wrap(model, **SMALL, policy=policy, reuse=reuse) as runtime:
        calls, events = watch(runtime, monkeypatch)
        model.generate(**inputs, max_new_tokens=36, do_sample=False)
        groups = runtime.layer_groups
        assert groups == {2: ((0, 1), (2,)), 3: ((0, 1, 2),)}[reuse]
        leader = {layer: group[0] for group in groups for layer in group}
        check_decode_outputs(calls, events, range(3), lengths, 35, chosen_by=leader)
        check_decode_outputs(calls, events, range(3), lengths, 35)
        stats = runtime.stats()
    pages = sum(int((e.pages >= 0).sum()) for e in events)
    assert stats.pages_read == pages
    tokens = sum(int((e.positions >= 0).sum()) for e in events)
    assert stats.bytes_to_device == tokens * 2 * 16 * 4  # K and V of every layer, head dim, float32
    assert stats.attended_max <= BUDGET + 1 + 15


@pytest.mark.parametrize("reuse", [2, 3, 64])
def test_a_covering_budget_equals_dense_attention(reuse):
    def use(model):
        cache = DynamicCache(config=model.config)
        parts = [forward(model, prompt(2, 150), cache)]
        parts.append(forward(model, prompt(2, 40, seed=1), cache))
        parts += [forward(model, prompt(2, 1, seed=i), cache) for i in range(40)]
        cache.crop(-75)
        other = copy.deepcopy(cache)
        cache.batch_select_indices(torch.tensor([1, 1, 0]))
        parts += [forward(model, prompt(3, 1, seed=i), cache) for i in range(40)]
        parts += [forward(model, prompt(2, 1, seed=i), other) for i in range(20)]
        return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])

    expected, got, _ = dense_and_ours(deep_model(), use, reuse=reuse)
    assert (got - expected).abs().max() <= 3e-4 * expected.abs().max()


def test_beams_and_sparse_chunks_equal_dense_attention():
    def use(model):
        ids = {"input_ids": prompt(1, 120)}
        beams = model.generate(**ids, max_new_tokens=24, num_beams=3, do_sample=False)
        cache = DynamicCache(config=model.config)
        forward(model, prompt(1, 90), cache)
        return beams, forward(model, prompt(1, 60, seed=2), cache)

    expected, got, _ = dense_and_ours(deep_model(), use, reuse=3, sparse_prefill=True)
    assert torch.equal(got[0], expected[0])
    assert (got[1] - expected[1]).abs().max() <= 3e-4 * expected[1].abs().max()


def test_a_sparse_chunk_reads_what_its_leader_reads_at_each_token(monkeypatch):
    model, lengths = build("llama"), [200]
    with IceRuntime.wrap(model, **SMALL, reuse=3, sparse_prefill=True) as runtime, torch.no_grad():
        _, events = watch(runtime, monkeypatch)
        cache = runtime.new_cache()
        forward(model, prompt(1, lengths[0]), cache)
        forward(model, prompt(1, 40, seed=1), cache)
        by_layer = [[e for e in events if e.layer == layer] for layer in range(3)]
        assert [len(of_layer) for of_layer in by_layer] == [40] * 3
        for led, *followed in zip(*by_layer, strict=True):
            assert all((led.pages == other.pages).all() for other in followed)
            assert (led.pages >= 0).any()
        for layer in cache.layers:
            assert layer.pages.shelf.choices == {}


def test_one_forest_a_group_and_row_is_built_and_searched():
    model, work = deep_model(6), {}
    for reuse in (1, 3):
        with IceRuntime.wrap(model, **SMALL, reuse=reuse) as runtime:
            cache = runtime.new_cache()
            forward(model, prompt(2, 1500), cache)
            for i in range(20):
                forward(model, prompt(2, 1, seed=i), cache)
            forests = {id(f): f for layer in cache.layers for f in layer.pages.forests}
            stats = runtime.stats()
            work[reuse] = len(forests), stats.index_bytes, stats.host_bytes, stats.bytes_to_host
            for forest in forests.values():
                forest.validate()
    assert (work[1][0], work[3][0]) == (12, 4)
    assert work[3][1] == pytest.approx(work[1][1] / 3, rel=0.1)  # the index shrinks,
    assert work[3][2] == pytest.approx(work[1][2], rel=0.05)  # the keys and values do not
    assert work[3][3] == work[1][3]


def test_layers_of_other_kinds_do_not_count():
    with IceRuntime.wrap(build("gemma3"), reuse=2) as runtime:
        assert runtime.layer_plan[0] != "retrieval"
        assert runtime.layer_groups == ((1, 3),)
    with IceRuntime.wrap(deep_model(), reuse=2, dense_layers=(0, 2)) as runtime:
        assert runtime.layer_groups == ((1, 3), (4,))

    def use(model):
        return model.generate(input_ids=prompt(2, 90), max_new_tokens=40, do_sample=False)

    expected, got, _ = dense_and_ours(build("gemma3"), use, reuse=2)
    assert torch.equal(got, expected)


def test_a_short_sequence_is_dense_and_becomes_paged_in_all_layers_of_a_group_at_once():
    model = deep_model()
    with IceRuntime.wrap(model, **{**SMALL, "dense_below": 100}, reuse=2) as runtime:
        cache, dense = runtime.new_cache(), DynamicCache()
        for first in range(0, 130, 10):
            ids = prompt(1, 10, seed=first)
            assert (forward(model, ids, cache) - forward(model, ids, dense)).abs().max() < 1e-3
            assert len({layer.pages is None for layer in cache.layers}) == 1
        assert cache.layers[0].pages.shelf is cache.layers[1].pages.shelf
        assert cache.layers[3].pages.shelf is not cache.layers[4].pages.shelf


class SpoiledError(Exception):
    pass


@pytest.mark.parametrize("n_before", [0, 80, 200])
@pytest.mark.parametrize("at", range(5))
def test_a_step_that_fails_at_any_layer_of_a_group_changes_nothing(at, n_before):
    model = deep_model()
    text = prompt(1, n_before + 60)
    expected = forward(model, text, DynamicCache())[:, n_before:]
    with IceRuntime.wrap(model, **{**SMALL, "budget": 4096, "dense_below": 100}, reuse=3) as runtime:
        cache = runtime.new_cache()
        if n_before:
            forward(model, text[:, :n_before], cache)

        def fail(*_):
            raise SpoiledError

        handle = model.model.layers[at].mlp.register_forward_hook(fail)
        with pytest.raises(SpoiledError):
            forward(model, text[:, n_before:], cache)
        handle.remove()
        assert cache.get_seq_length() == n_before
        got = forward(model, text[:, n_before:], cache)
        more = forward(model, prompt(1, 1), cache)
    assert (got - expected).abs().max() <= 3e-4 * expected.abs().max()
    assert more.isfinite().all()


def test_bad_keys_of_a_follower_are_refused_and_name_it():
    model = deep_model()
    with IceRuntime.wrap(model, **SMALL, reuse=3) as runtime:
        cache = runtime.new_cache()

        def spoil(_module, _args, output):
            output = output.clone()
            output[0, 40] = float("nan")
            return output

        handle = model.model.layers[2].self_attn.k_proj.register_forward_hook(spoil)
        with pytest.raises(BadTensorError, match="layer 2, row 0"):
            forward(model, prompt(1, 200), cache)
        handle.remove()
        assert cache.get_seq_length() == 0
        assert forward(model, prompt(1, 200), cache).isfinite().all()


def test_cropping_or_reordering_single_layers_of_a_group_is_refused_at_the_next_step():
    model = deep_model()
    with IceRuntime.wrap(model, **SMALL, reuse=3) as runtime:
        cache = runtime.new_cache()
        forward(model, prompt(2, 300), cache)
        other = copy.deepcopy(cache)
        cache.layers[1].crop(-150)
        with pytest.raises(CacheStateError, match="only some of the layers"):
            forward(model, prompt(2, 1), cache)
        other.layers[0].batch_select_indices(torch.tensor([1, 0]))
        with pytest.raises(CacheStateError, match="has not attended"):
            forward(model, prompt(2, 1), other)


def test_a_cache_is_adopted_by_a_runtime_with_the_same_groups_only():
    model, ids = deep_model(), prompt(1, 200)
    dense = DynamicCache()
    forward(model, ids, dense)
    with IceRuntime.wrap(model, **SMALL, reuse=2) as first:
        cache = first.adopt(dense)
        short = first.new_cache()
        expected = forward(model, prompt(1, 1), copy.deepcopy(cache))
    with IceRuntime.wrap(model, **SMALL, reuse=2) as second:
        assert torch.equal(forward(model, prompt(1, 1), second.adopt(cache)), expected)
        assert second.adopt(short).get_seq_length() == 0
    with IceRuntime.wrap(model, **SMALL, reuse=3) as third:
        with pytest.raises(CacheStateError, match=r"shared by layers \(0, 1\)"):
            third.adopt(cache)
        assert forward(model, prompt(1, 1), third.adopt(dense)).isfinite().all()


def test_a_layer_that_stays_dense_leaves_its_group(monkeypatch):
    model, ids = deep_model(), prompt(1, 150)
    expected = forward(model, ids, DynamicCache())
    forward_of_one = model.model.layers[1].self_attn.forward
    monkeypatch.setattr(
        model.model.layers[1].self_attn, "forward", lambda *a, **k: forward_of_one(*a, **k, indices=ids)
    )
    with IceRuntime.wrap(model, **{**SMALL, "budget": 4096}, reuse=3, on_unsupported="dense") as runtime:
        cache = runtime.new_cache()
        assert (forward(model, ids, cache) - expected).abs().max() <= 3e-4 * expected.abs().max()
        assert runtime.layer_groups == ((0, 2), (3, 4))
        assert [getattr(layer, "members", None) for layer in cache.layers] == [(0, 2), None, (0, 2), (3, 4), (3, 4)]
        plain = DynamicCache()
        forward(model, ids, plain)
        for i in range(20):
            got, want = (forward(model, prompt(1, 1, seed=i), c) for c in (cache, plain))
            assert got.isfinite().all()
        assert (got - want).abs().max() <= 3e-4 * want.abs().max()


def test_layers_of_different_shapes_cannot_share_pages(monkeypatch):
    model = deep_model()
    with IceRuntime.wrap(model, **SMALL, reuse=3) as runtime:
        cache = runtime.new_cache()
        _ = model.model.layers[1].self_attn
        inner = type(cache.layers[1]).update

        def narrow(layer, keys, values, *args, **kwargs):
            if layer.layer_idx == 1:
                keys, values = keys[:, :1], values[:, :1]
            return inner(layer, keys, values, *args, **kwargs)

        monkeypatch.setattr(type(cache.layers[1]), "update", narrow)
        monkeypatch.setattr(model.model.layers[1].self_attn, "num_key_value_groups", 4)
        with pytest.raises(UnsupportedModelError, match=r"layer 1: its keys and values .* set reuse=1"):
            forward(model, prompt(1, 100), cache)


@pytest.mark.parametrize("policy", ["token-oracle", "streaming"])
def test_policies_that_choose_no_pages_are_refused(policy):
    with pytest.raises(ConfigError, match="reuse must be 1"):
        IceRuntime.wrap(build("llama"), policy=policy, reuse=2)


def test_the_policy_of_that_name_shares_pages_as_published_unless_told_otherwise():
    for settings, groups in (({}, ((0, 1, 2), (3, 4))), ({"reuse": 2}, ((0, 1), (2, 3), (4,)))):
        with IceRuntime.wrap(deep_model(), policy="icecache-reuse", **settings) as runtime:
            assert runtime.layer_groups == groups
            assert runtime.config.reuse == len(groups[0])


@pytest.mark.parametrize("reuse", [0, 65, 1.5, True, "3"])
def test_reuse_is_checked(reuse):
    with pytest.raises(ConfigError, match=r"reuse must be an integer in 1..=64"):
        IceRuntime.wrap(build("llama"), reuse=reuse)
