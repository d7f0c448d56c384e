"""While a sequence is shorter than `dense_below` nothing changes, bit for bit; from then on it lives in pages."""

from __future__ import annotations

import pytest
import torch
from icecache import IceRuntime
from tiny import BUILDERS, build, left_padded, prompt
from transformers import DynamicCache


def steps(model, ids, cuts, cache, mask=None):
    """Logits of each forward."""
    logits = []
    with torch.no_grad():
        for first, last in cuts:
            seen = None if mask is None else mask[:, :last]
            out = model(ids[:, first:last], attention_mask=seen, past_key_values=cache, use_cache=True)
            logits.append(out.logits)
    return logits


CUTS = [(0, 40), (40, 52), *((i, i + 1) for i in range(52, 110))]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", BUILDERS)
def test_logits_are_bit_identical_below_the_threshold_and_pages_are_read_after_it(family, implementation):
    model, ids = build(family), prompt(2, 110)
    model.set_attn_implementation(implementation)
    expected = steps(model, ids, CUTS, DynamicCache(config=model.config))
    with IceRuntime.wrap(model, dense_below=80, budget=1024) as runtime:
        cache = runtime.new_cache()
        got = steps(model, ids, [cut for cut in CUTS if cut[1] <= 80], cache)
        assert runtime.stats().pages_read == 0
        got += steps(model, ids, [cut for cut in CUTS if cut[1] > 80], cache)
        assert runtime.stats().pages_read > 0
    # The step that reaches length 80 is still dense; the later ones merge pages and round differently.
    for (_, last), ours, dense in zip(CUTS, got, expected, strict=True):
        if last <= 80:
            assert torch.equal(ours, dense), f"at length {last}"
        assert (ours - dense).abs().max() <= 1e-4 * dense.abs().max()


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_padded_batch_is_bit_identical_below_the_threshold_and_ragged_after_it(family):
    model, batch = build(family), left_padded([110, 61], seed=3)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    expected = steps(model, ids, CUTS, DynamicCache(config=model.config), mask)
    with IceRuntime.wrap(model, dense_below=80, budget=1024) as runtime:
        cache = runtime.new_cache()
        got = steps(model, ids, CUTS, cache, mask)
        assert runtime.stats().attended_min < 70 < runtime.stats().attended_max
    for (_, last), ours, dense in zip(CUTS, got, expected, strict=True):
        row = 0 if last <= 49 else slice(None)  # row 1 is all padding before: its output means nothing
        if last <= 80:
            assert torch.equal(ours[row], dense[row])
        real = mask[:, last - ours.shape[1] : last].bool()
        assert (ours - dense)[real].abs().max() <= 1e-4 * dense[real].abs().max()


def test_a_prompt_past_the_threshold_is_paged_at_once():
    model = build("llama")
    with IceRuntime.wrap(model, dense_below=80) as runtime:
        cache = runtime.new_cache()
        steps(model, prompt(1, 200), [(0, 200)], cache)
        stats = runtime.stats()
        assert stats.host_bytes >= 3 * 2 * (200 - 48) * 2 * 16 * 4  # layers, heads, tokens, K and V, dim, float32
        near_bytes = 3 * 2 * (48 + 96) * 2 * 16 * 4
        assert stats.device_bytes <= near_bytes


def test_cropping_below_the_threshold_keeps_the_sequence_exact():
    model, ids = build("llama"), prompt(1, 120)
    full = steps(model, ids, [(0, 120)], DynamicCache())[0]
    with IceRuntime.wrap(model, dense_below=80, budget=1024) as runtime:
        cache = runtime.new_cache()
        steps(model, ids, [(0, 70)], cache)
        cache.crop(-20)
        steps(model, ids, [(50, 100)], cache)
        cache.crop(-60)
        got = steps(model, ids, [(40, 41), (41, 120)], cache)[1]
    assert (got[:, -1] - full[:, -1]).abs().max() <= 1e-4 * full.abs().max()


def test_reordering_a_short_sequence_reorders_its_rows():
    model, ids = build("llama"), prompt(3, 50)
    order = torch.tensor([2, 0, 0])
    plain = DynamicCache()
    steps(model, ids, [(0, 49)], plain)
    plain.reorder_cache(order)
    expected = steps(model, ids[order], [(49, 50)], plain)[0]
    with IceRuntime.wrap(model, dense_below=80) as runtime:
        cache = runtime.new_cache()
        steps(model, ids, [(0, 49)], cache)
        cache.reorder_cache(order)
        assert torch.equal(steps(model, ids[order], [(49, 50)], cache)[0], expected)
