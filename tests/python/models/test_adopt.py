"""`adopt`: one dense prefill, or one index, serves several runtimes, and the adopted cache stays as it was."""

from __future__ import annotations

import pytest
import torch
from icecache import CacheStateError, IceRuntime, _core
from icecache.pages import Stores
from tiny import build, left_padded, prompt
from transformers import DynamicCache


def forward(model, ids, cache, **kwargs):
    with torch.no_grad():
        return model(ids, past_key_values=cache, use_cache=True, **kwargs).logits


def content(cache):
    return [(layer.keys.clone(), layer.values.clone()) for layer in cache.layers]


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
def test_a_dense_prefill_is_taken_over_and_left_as_it_was(family):
    model, ids = build(family), prompt(2, 200)
    full = model.generate(ids, max_new_tokens=30, do_sample=False)
    dense = DynamicCache(config=model.config)
    forward(model, ids[:, :-1], dense)
    before = content(dense)
    for _ in range(2):
        with IceRuntime.wrap(model, budget=1024, dense_below=0) as runtime:
            cache = runtime.adopt(dense)
            got = model.generate(ids, past_key_values=cache, max_new_tokens=30, do_sample=False)
            assert runtime.stats().pages_read > 0
        assert torch.equal(full, got)
    for (a, b), (c, d) in zip(before, content(dense), strict=True):
        assert torch.equal(a, c)
        assert torch.equal(b, d)
    assert torch.equal(full, model.generate(ids, past_key_values=dense, max_new_tokens=30, do_sample=False))


def test_padding_of_an_adopted_batch_is_dropped():
    model, batch = build("llama"), left_padded([200, 90])
    expected = model.generate(**batch, max_new_tokens=30, do_sample=False)
    dense = DynamicCache()
    ids, mask = batch["input_ids"], batch["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    forward(model, ids[:, :-1], dense, attention_mask=mask[:, :-1], position_ids=positions[:, :-1])
    with IceRuntime.wrap(model, budget=1024, dense_below=0) as runtime:
        cache = runtime.adopt(dense, attention_mask=mask[:, :-1])
        got = model.generate(**batch, past_key_values=cache, max_new_tokens=30, do_sample=False)
        assert cache.layers[0].pages.length(1) == 90 + 29
        with pytest.raises(CacheStateError, match=r"attention_mask must have shape \(2, 199\)"):
            runtime.adopt(dense, attention_mask=mask)
    assert torch.equal(expected, got)


def test_an_adopted_cache_equals_one_that_was_prefilled_here():
    model, ids = build("llama"), prompt(1, 1500)
    dense = DynamicCache()
    forward(model, ids, dense)
    with IceRuntime.wrap(model, dense_below=0) as runtime:
        own = runtime.new_cache()
        forward(model, ids, own)
        adopted = runtime.adopt(dense)
        for a, b in zip(own.layers, adopted.layers, strict=True):
            assert a.pages.forests[0].digest() == b.pages.forests[0].digest()


def test_the_index_of_one_runtime_serves_others_with_other_budgets_and_policies():
    model, ids = build("llama"), prompt(1, 2300)
    outputs, expected = {}, {}
    for policy, budget in [("icecache", 128), ("page-oracle", 96), ("random", 80)]:
        with IceRuntime.wrap(model, budget=budget, dense_below=0, policy=policy):
            expected[policy] = model.generate(ids, max_new_tokens=20, do_sample=False)
    with IceRuntime.wrap(model, dense_below=0) as first:
        prefilled = first.new_cache()
        forward(model, ids[:, :-1], prefilled)
        host = first.stats().host_bytes
    for policy, budget in [("icecache", 128), ("page-oracle", 96), ("random", 80)]:
        with IceRuntime.wrap(model, budget=budget, dense_below=0, policy=policy) as runtime:
            cache = runtime.adopt(prefilled)
            outputs[policy] = model.generate(ids, past_key_values=cache, max_new_tokens=20, do_sample=False)
            assert runtime.stats().ms["prefill_offload"] == 0
            assert runtime.stats().host_bytes == first.stats().host_bytes <= 1.3 * host
            del cache
    assert prefilled.layers[0].pages.length(0) == 2299
    for policy in expected:
        same = (outputs[policy] == expected[policy]).float().mean()
        assert same >= 0.95, policy  # the prompt's last token was decoded here and prefilled there


def test_a_narrower_window_takes_over_pages_and_its_surplus_joins_them():
    model, ids = build("llama"), prompt(1, 400)
    with IceRuntime.wrap(model, dense_below=0, window_tokens=48, budget=80) as first:
        prefilled = first.new_cache()
        forward(model, ids[:, :-3], prefilled)
    with IceRuntime.wrap(model, dense_below=0, budget=1024, window_tokens=16) as runtime:
        own, cache = runtime.new_cache(), runtime.adopt(prefilled)
        forward(model, ids[:, :-3], own)
        for t in range(397, 400):
            got, expected = (forward(model, ids[:, t : t + 1], x) for x in (cache, own))
            assert (got - expected).abs().max() <= 1e-4 * expected.abs().max(), "everything fits the budget"
        for layer in cache.layers:
            assert 16 < layer.pages.near.window_count(0) < 16 + 16 + 1
            assert layer.pages.length(0) == 400
    assert prefilled.layers[0].pages.near.window_count(0) == 48


def test_pages_of_several_runtimes_are_read_in_place_where_all_are_page_locked():
    pool = _core.Pool(1)

    def stores(memory):
        return Stores(None, pool, memory)

    pinned = [_core.HostMemory(pool, pin="simulated") for _ in range(2)]
    pageable = _core.HostMemory(pool, pin="never")
    heir = stores(None)
    assert not heir.is_pinned(), "there is no memory yet"
    heir.share(stores(None))
    assert not heir.is_pinned()
    heir.share(stores(pinned[0]))
    heir.share(stores(pinned[1]))
    assert heir.is_pinned()
    assert heir.memory is pinned[0]
    heir.share(stores(pageable))
    assert not heir.is_pinned()


def test_a_short_sequence_of_another_runtime_is_paged_by_the_new_threshold():
    model, ids = build("llama"), prompt(1, 200)
    dense = forward(model, ids, DynamicCache())[:, -1:]
    with IceRuntime.wrap(model, dense_below=4096) as first:
        short = first.new_cache()
        forward(model, ids[:, :-1], short)
    with IceRuntime.wrap(model, dense_below=100, budget=1024) as runtime:
        cache = runtime.adopt(short)
        assert cache.layers[0].pages is not None
        assert short.layers[0].pages is None
        got = forward(model, ids[:, -1:], cache)
        assert runtime.stats().pages_read > 0
    assert (got - dense).abs().max() <= 1e-4 * dense.abs().max()


@pytest.mark.parametrize("later_threshold", [0, 205])
def test_padding_of_a_short_sequence_of_another_runtime_is_dropped(later_threshold):
    """A dense cache has padding in it and does not know where: the mask says so, now or when it is paged."""
    model, batch = build("llama"), left_padded([200, 90])
    expected = model.generate(**batch, max_new_tokens=30, do_sample=False)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with IceRuntime.wrap(model, dense_below=4096) as first:
        short = first.new_cache()
        forward(model, ids[:, :-1], short, attention_mask=mask[:, :-1], position_ids=positions[:, :-1])
    with IceRuntime.wrap(model, budget=1024, dense_below=later_threshold) as runtime:
        cache = runtime.adopt(short, attention_mask=mask[:, :-1])
        got = model.generate(**batch, past_key_values=cache, max_new_tokens=30, do_sample=False)
        assert cache.layers[0].pages.length(1) == 90 + 29
        if later_threshold == 0:
            with pytest.raises(CacheStateError, match="disagrees with the masks of earlier steps"):
                model.generate(**batch, past_key_values=runtime.adopt(short), max_new_tokens=2)
    assert torch.equal(expected, got)


def test_what_does_not_fit_is_refused_with_the_difference():
    model, ids = build("llama"), prompt(1, 200)
    with IceRuntime.wrap(model, dense_below=0) as first:
        prefilled = first.new_cache()
        forward(model, ids, prefilled)
    plain = DynamicCache(config=build("gemma3").config)
    for settings, match in [
        ({"policy": "streaming"}, "sink 16 and window 32, this runtime has sink 4 and window 252"),
        ({"sink_tokens": 32}, "this runtime has sink 32 and window 32"),
        ({"dense_layers": (1,)}, "layer 1: the cache holds pages, but this runtime keeps the layer dense"),
    ]:
        with IceRuntime.wrap(model, dense_below=0, **settings) as runtime:
            with pytest.raises(CacheStateError, match=match):
                runtime.adopt(prefilled)
            with pytest.raises(CacheStateError, match="the cache has 4 layers, the model 3"):
                runtime.adopt(plain)
