"""With a budget that covers the context, every way to generate gives the tokens of the plain model."""

from __future__ import annotations

import copy

import pytest
import torch
from icecache import IceRuntime
from tiny import BUILDERS, build, dense_and_ours, left_padded, prompt
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer


class Collector(BaseStreamer):
    def __init__(self):
        self.tokens: list[int] = []

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.tokens.append(-1)


def greedy(model):
    return model.generate(prompt(2, 90), max_new_tokens=40, do_sample=False)


def sampled(model):
    torch.manual_seed(7)
    return model.generate(prompt(1, 90), max_new_tokens=30, do_sample=True, temperature=1.5, top_p=0.95)


def beams(model):
    return model.generate(prompt(1, 90), max_new_tokens=20, do_sample=False, num_beams=3, num_return_sequences=2)


def padded_beams(model):
    return model.generate(**left_padded([40, 90]), max_new_tokens=12, do_sample=False, num_beams=2)


def several_sequences(model):
    torch.manual_seed(7)
    return model.generate(prompt(1, 90), max_new_tokens=20, do_sample=True, num_return_sequences=3)


def streamed(model):
    collector = Collector()
    model.generate(prompt(1, 90), max_new_tokens=20, do_sample=False, streamer=collector)
    return torch.tensor(collector.tokens)


def ragged_batch(model):
    return model.generate(**left_padded([120, 37, 70, 5]), max_new_tokens=40, do_sample=False)


def chunked_prefill(model):
    return model.generate(prompt(2, 130), max_new_tokens=20, do_sample=False, prefill_chunk_size=32)


def chunked_prefill_of_a_ragged_batch(model):
    return model.generate(**left_padded([130, 50]), max_new_tokens=20, do_sample=False, prefill_chunk_size=48)


def several_turns(model):
    cache, ids = DynamicCache(config=model.config), prompt(1, 90)
    for turn in range(3):
        # An explicit mask: left alone, generate() would take generated padding tokens for padding.
        mask = torch.ones_like(ids)
        ids = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=18, do_sample=False)
        ids = torch.cat([ids, prompt(1, 21, seed=turn + 1)], 1)
    return ids


def prompt_lookup(model):
    ids = prompt(1, 30).repeat(1, 4)
    # Transformers before 5.10 cannot do this without an end token.
    return model.generate(ids, max_new_tokens=40, do_sample=False, prompt_lookup_num_tokens=6, eos_token_id=2)


WAYS = [
    greedy,
    sampled,
    beams,
    padded_beams,
    several_sequences,
    streamed,
    ragged_batch,
    chunked_prefill,
    chunked_prefill_of_a_ragged_batch,
    several_turns,
    prompt_lookup,
]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("family", BUILDERS)
def test_a_covering_budget_gives_the_tokens_of_dense_attention(family, way):
    model = build(family)
    try:
        way(model)
    except ValueError as error:  # transformers before 5.18 cannot crop a full sliding window
        pytest.skip(f"the plain model cannot do this: {error}")
    expected, got, stats = dense_and_ours(model, way)
    assert torch.equal(expected, got)
    assert stats.pages_read > 0
    assert not abs(stats.mass_kept - 1.0) > 1e-6  # NaN where every step checked a draft of several tokens


@pytest.mark.parametrize("family", ["llama", "mistral", "phi3", "gpt2"])
def test_a_small_budget_gives_other_tokens_so_these_tests_can_fail(family):
    expected, got, stats = dense_and_ours(build(family), greedy, budget=64, sink_tokens=16, window_tokens=32)
    assert not torch.equal(expected, got)
    assert stats.attended_max <= 64 + 1 + 15


@pytest.mark.parametrize("wrap_assistant", [False, True])
def test_assisted_decoding_gives_the_tokens_of_dense_attention(wrap_assistant):
    model, assistant = build("llama"), build("llama", seed=1)

    def use(model):
        return model.generate(prompt(1, 90), max_new_tokens=40, do_sample=False, assistant_model=assistant)

    expected = use(model)
    with IceRuntime.wrap(model, budget=4096, dense_below=0) as runtime:
        if wrap_assistant:
            with IceRuntime.wrap(assistant, budget=4096, dense_below=0):
                assert torch.equal(expected, use(model))
        else:
            assert torch.equal(expected, use(model))
        assert runtime.stats().pages_read > 0


def test_a_cache_filled_in_inference_mode_goes_on_outside_of_it_and_back():
    model, ids = build("llama"), prompt(2, 180)
    expected = model.generate(ids, max_new_tokens=30, do_sample=False)
    with IceRuntime.wrap(model, budget=4096, dense_below=0) as runtime:
        cache = runtime.new_cache()
        with torch.inference_mode():
            model(ids[:, :140], past_key_values=cache, use_cache=True)
            cache.reorder_cache(torch.tensor([0, 1]))
        so_far = model.generate(ids, past_key_values=cache, max_new_tokens=10, do_sample=False)
        with torch.inference_mode():
            twin = copy.deepcopy(cache)
            got = model.generate(so_far, past_key_values=cache, max_new_tokens=20, do_sample=False)
        again = model.generate(so_far, past_key_values=twin, max_new_tokens=20, do_sample=False)
    assert torch.equal(expected, got)
    assert torch.equal(expected, again)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_copied_cache_continues_as_if_the_other_copy_did_not_exist(family):
    model, prefix = build(family), prompt(1, 120)
    suffixes = [torch.cat([prefix, prompt(1, 25, seed=s)], 1) for s in (1, 2)]
    expected = [model.generate(ids, max_new_tokens=30, do_sample=False) for ids in suffixes]
    with IceRuntime.wrap(model, budget=4096, dense_below=0) as runtime, torch.no_grad():
        cache = runtime.new_cache()
        model(prefix, past_key_values=cache, use_cache=True)
        copies = [copy.deepcopy(cache) for _ in suffixes]
        got = [
            model.generate(ids, past_key_values=own, max_new_tokens=30, do_sample=False)
            for ids, own in zip(suffixes, copies, strict=True)
        ]
        assert cache.get_seq_length() == 120
        again = model.generate(suffixes[0], past_key_values=cache, max_new_tokens=30, do_sample=False)
    assert torch.equal(expected[0], got[0])
    assert torch.equal(expected[1], got[1])
    assert torch.equal(expected[0], again)


def test_the_caller_s_own_dynamic_cache_is_the_one_that_fills():
    model, cache = build("llama"), DynamicCache()
    with IceRuntime.wrap(model, budget=4096, dense_below=0) as runtime:
        model.generate(prompt(1, 90), past_key_values=cache, max_new_tokens=5, do_sample=False)
        assert cache.get_seq_length() == 94
        assert runtime.stats().device_bytes > 0
        assert all(type(layer).__name__ == "RetrievalLayer" for layer in cache.layers)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt2"])
def test_logits_of_every_step_equal_dense_ones_to_float32_rounding(family):
    model, ids = build(family), prompt(2, 140)

    def use(model):
        cache, logits = DynamicCache(config=model.config), []
        with torch.no_grad():
            for first, last in [(0, 70), (70, 71), (71, 95), *((i, i + 1) for i in range(95, 140))]:
                logits.append(model(ids[:, first:last], past_key_values=cache, use_cache=True).logits)
        return torch.cat(logits, 1)

    expected, got, _ = dense_and_ours(model, use)
    scale = expected.abs().max()
    assert (expected - got).abs().max() <= 2e-5 * scale


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_accurate_as_the_dense_model(dtype):
    exact, ids = build("llama").double(), prompt(1, 140)

    def use(model):
        cache, logits = DynamicCache(), []
        with torch.no_grad():
            for first, last in [(0, 90), *((i, i + 1) for i in range(90, 140))]:
                logits.append(model(ids[:, first:last], past_key_values=cache, use_cache=True).logits.double())
        return torch.cat(logits, 1)

    truth = use(exact)
    dense, got, stats = dense_and_ours(exact.to(dtype), use)
    assert stats.pages_read > 0
    assert (got - truth).abs().mean() <= 1.25 * (dense - truth).abs().mean()


def test_the_index_gives_the_same_tokens_for_any_number_of_threads():
    model = build("llama")
    results = []
    for threads in (1, 2, 5):
        with IceRuntime.wrap(model, budget=96, dense_below=0, threads=threads):
            results.append(model.generate(prompt(2, 400), max_new_tokens=50, do_sample=False))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
