"""Later chunks: exact by default, token by token on request; crops, forks and reorders in between."""

from __future__ import annotations

import copy

import pytest
import torch
from icecache import IceRuntime, UnsupportedModelError
from icecache.errors import CacheStateError
from tiny import build, prompt
from transformers import DynamicCache


def forward(model, ids, cache, **kwargs):
    with torch.no_grad():
        return model(ids, past_key_values=cache, use_cache=True, **kwargs).logits


def one_by_one(model, ids, cache):
    return torch.cat([forward(model, ids[:, i : i + 1], cache) for i in range(ids.shape[1])], 1)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2"])
@pytest.mark.parametrize("policy", ["icecache", "streaming", "token-oracle"])
def test_sparse_prefill_equals_decoding_the_chunk_token_by_token(family, policy):
    model, ids = build(family), prompt(2, 330)
    with IceRuntime.wrap(model, budget=96, dense_below=0, sparse_prefill=True, policy=policy) as runtime:
        cache = runtime.new_cache()
        forward(model, ids[:, :250], cache)
        single = copy.deepcopy(cache)
        chunked = forward(model, ids[:, 250:], cache)
        before = runtime.stats()
        stepped = one_by_one(model, ids[:, 250:], single)
        after = runtime.stats()
    # A chunk's projections round differently than one token's; near ties of pages can fall the other way.
    close = (chunked - stepped).abs().amax(-1) <= 1e-3 * stepped.abs().max()
    assert close.float().mean() >= 0.98
    assert after.attended_mean == pytest.approx(before.attended_mean, rel=1e-3)


def ours(cache):
    return [layer for layer in cache.layers if type(layer).__name__ == "RetrievalLayer"]


def test_the_index_after_a_sparse_chunk_is_the_index_after_single_steps():
    """The first layer's keys do not depend on attention, so its forest must be bit-identical."""
    model, ids = build("llama"), prompt(1, 400)
    with IceRuntime.wrap(model, budget=96, dense_below=0, sparse_prefill=True) as runtime:
        chunked, stepped = runtime.new_cache(), runtime.new_cache()
        for cache in (chunked, stepped):
            forward(model, ids[:, :200], cache)
        forward(model, ids[:, 200:], chunked)
        one_by_one(model, ids[:, 200:], stepped)
        a, b = ours(chunked)[0].pages, ours(stepped)[0].pages
        assert [len(f) for f in a.forests] == [len(f) for f in b.forests] == [400 - 16 - 40]
        assert a.near.starts == b.near.starts
        assert a.forests[0].counters() == b.forests[0].counters()


def test_an_exact_chunk_differs_from_a_sparse_one_so_the_tests_above_can_fail():
    model, ids = build("llama"), prompt(1, 330)
    logits = []
    for sparse in (False, True):
        with IceRuntime.wrap(model, budget=64, dense_below=0, sparse_prefill=sparse) as runtime:
            cache = runtime.new_cache()
            forward(model, ids[:, :250], cache)
            logits.append(forward(model, ids[:, 250:], cache))
    dense = forward(model, ids, DynamicCache())[:, 250:]
    assert (logits[0] - dense).abs().max() <= 1e-4 * dense.abs().max()
    assert (logits[1] - dense).abs().max() > 1e-2 * dense.abs().max()


def test_a_later_chunk_is_exact_under_a_small_budget_however_many_blocks_it_streams(monkeypatch):
    monkeypatch.setattr("icecache.transfer.pieces.BLOCK_TOKENS", 48)
    model, ids = build("qwen3"), prompt(2, 330)
    dense = forward(model, ids, DynamicCache())[:, 250:]
    with IceRuntime.wrap(model, budget=64, dense_below=0) as runtime:
        cache = runtime.new_cache()
        forward(model, ids[:, :250], cache)
        got = forward(model, ids[:, 250:], cache)
        assert runtime.stats().attended_max == 0
    assert (got - dense).abs().max() <= 1e-4 * dense.abs().max()


@pytest.mark.parametrize("n", [1, 7, 20, 33, 60, 150, 299])
@pytest.mark.parametrize("convention", ["negative", "absolute"])
def test_a_cropped_sequence_continues_as_its_prefix_would(n, convention):
    model, ids = build("llama"), prompt(2, 340)
    prefix = torch.cat([ids[:, : 300 - n], ids[:, 300:]], 1)
    dense = forward(model, prefix, DynamicCache())[:, 300 - n :]
    with IceRuntime.wrap(model, budget=4096, dense_below=0) as runtime:
        cache = runtime.new_cache()
        forward(model, ids[:, :260], cache)
        one_by_one(model, ids[:, 260:300], cache)
        for layer in cache.layers:
            layer.crop(-n if convention == "negative" else 300 - n)
        assert cache.get_seq_length() == 300 - n
        for layer in ours(cache):
            assert layer.pages.length(0) == 300 - n
            assert layer.pages.near.window_count(0) >= min(32, max(0, 300 - n - 16))
            for forest in layer.pages.forests:
                forest.validate()
        got = torch.cat([forward(model, ids[:, 300:320], cache), one_by_one(model, ids[:, 320:], cache)], 1)
    assert (got - dense).abs().max() <= 1e-4 * dense.abs().max()


def test_small_crops_never_touch_the_index(monkeypatch):
    """Tokens enter the index one step late, so a rejected draft is still in the window."""

    def touched(*_):
        raise AssertionError("the index was cropped")

    model, ids = build("llama"), prompt(1, 300)
    with IceRuntime.wrap(model, dense_below=0) as runtime:
        cache = runtime.new_cache()
        forward(model, ids[:, :200], cache)
        monkeypatch.setattr("icecache.pages.LayerPages._cropped", touched)
        for i in range(0, 60, 4):
            forward(model, ids[:, 200 + i : 212 + i], cache)
            cache.crop(-8)
        assert cache.get_seq_length() == 260
        with pytest.raises(AssertionError, match="was cropped"):
            cache.crop(-60)


@pytest.mark.parametrize("operation", ["reorder_cache", "batch_select_indices", "batch_repeat_interleave"])
def test_rows_move_with_their_pages_and_copies_do_not_see_each_other(operation):
    model, ids = build("llama"), prompt(3, 200)
    rows = {"reorder_cache": [2, 0, 2], "batch_select_indices": [1, 2], "batch_repeat_interleave": [0, 0, 1, 1, 2, 2]}
    order = torch.tensor(rows[operation])
    tails = prompt(len(order), 40, seed=9)
    dense = forward(model, torch.cat([ids[order], tails], 1), DynamicCache())[:, 200:]
    with IceRuntime.wrap(model, budget=4096, dense_below=0) as runtime:
        cache = runtime.new_cache()
        forward(model, ids, cache)
        getattr(cache, operation)(2 if operation == "batch_repeat_interleave" else order)
        got = one_by_one(model, tails, cache)
    assert (got - dense).abs().max() <= 1e-4 * dense.abs().max()


def test_a_fork_shares_its_pages():
    model = build("llama")
    with IceRuntime.wrap(model, dense_below=0) as runtime:
        cache = runtime.new_cache()
        forward(model, prompt(1, 2200), cache)
        one = runtime.stats().host_bytes
        forks = [copy.deepcopy(cache) for _ in range(5)]
        assert runtime.stats().host_bytes <= 1.25 * one
        del forks


@pytest.mark.parametrize("chunk", [40, 1], ids=["one chunk", "token by token"])
def test_chunks_of_a_ragged_batch_keep_their_rows_apart(chunk):
    """Second turns of different length: padding lies in the middle of the row."""
    model = build("llama")
    ids, mask = prompt(2, 260), torch.ones(2, 260, dtype=torch.long)
    mask[1, :70] = mask[1, 200:222] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    dense = forward(model, ids, DynamicCache(), attention_mask=mask, position_ids=positions)
    with IceRuntime.wrap(model, budget=4096, dense_below=0) as runtime:
        cache, got = runtime.new_cache(), []
        second_turn = [(i, i + chunk) for i in range(200, 240, chunk)]
        for first, last in [(0, 200), *second_turn, *((i, i + 1) for i in range(240, 260))]:
            step = {"attention_mask": mask[:, :last], "position_ids": positions[:, first:last]}
            got.append(forward(model, ids[:, first:last], cache, **step))
        lengths = [layer.pages.length(1) for layer in ours(cache)]
    assert lengths == [260 - 70 - 22] * 3
    real = mask.bool()
    assert (torch.cat(got, 1) - dense)[real].abs().max() <= 1e-4 * dense[real].abs().max()


@pytest.mark.parametrize("n_new", [1, 30])
def test_a_mask_that_contradicts_earlier_ones_is_refused(n_new):
    model, ids = build("llama"), prompt(1, 130)
    with IceRuntime.wrap(model, dense_below=0) as runtime:
        cache = runtime.new_cache()
        forward(model, ids[:, :100], cache)
        mask = torch.ones(1, 100 + n_new)
        mask[0, 50] = 0
        with pytest.raises(CacheStateError, match="disagrees with the masks of earlier steps"):
            forward(model, ids[:, 100 : 100 + n_new], cache, attention_mask=mask)
        assert cache.get_seq_length() == 100


def test_a_custom_mask_inside_a_chunk_is_honoured_and_one_over_the_past_is_refused():
    model, ids = build("llama"), prompt(1, 130)
    mask = torch.ones(1, 1, 130, 130, dtype=torch.bool).tril()
    mask[..., 110:120, 110:120] = True  # a block that sees itself in both directions
    dense = forward(model, ids, DynamicCache(), attention_mask=mask)[:, 100:]
    with IceRuntime.wrap(model, budget=4096, dense_below=0) as runtime:
        cache = runtime.new_cache()
        forward(model, ids[:, :100], cache)
        got = forward(model, ids[:, 100:], copy.deepcopy(cache), attention_mask=mask[:, :, 100:])
        hiding = mask[:, :, 100:].clone()
        hiding[..., 40] = False
        with pytest.raises(UnsupportedModelError, match="hides earlier tokens"):
            forward(model, ids[:, 100:], cache, attention_mask=hiding)
    assert (got - dense).abs().max() <= 1e-4 * dense.abs().max()
