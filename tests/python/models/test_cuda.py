"""The runtime on a CUDA device: sink and window there, pages and search on the host, selected pages cross by copies."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from icecache import IceRuntime, PoolExhaustedError
from icecache.errors import BadTensorError
from icecache.eval.needle import load_needle, make_samples
from tiny import build, dense_and_ours, left_padded, prompt
from transformers import DynamicCache

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
LENGTH = 2048


def on_device(inputs):
    return {name: tensor.to(DEVICE) for name, tensor in inputs.items()}


def forward(model, ids, cache, **kwargs):
    with torch.no_grad():
        return model(ids.to(DEVICE), past_key_values=cache, use_cache=True, **kwargs).logits


def answer(model, sample):
    """Greedy answer of the shipped model, on whatever device it is."""
    ids = torch.tensor([sample.prompt], device=model.device)
    n_new = len(sample.answer)
    options = {"do_sample": False, "min_new_tokens": n_new, "max_new_tokens": n_new}
    out = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return tuple(out[0, ids.shape[1] :].tolist())


@pytest.fixture(scope="module")
def samples():
    return [s for task in ("passkey", "kv32", "vt3") for s in make_samples(task, LENGTH, 2, seed=31)]


@pytest.fixture(scope="module")
def needle():
    return load_needle(DEVICE)[0]


def test_a_covering_budget_gives_the_answers_of_dense_attention(needle, samples):
    dense = [answer(needle, sample) for sample in samples]
    with IceRuntime.wrap(needle, budget=48 + 2 * LENGTH, dense_below=0) as runtime:
        assert [answer(needle, sample) for sample in samples] == dense
        stats = runtime.stats()
    assert stats.pages_read > 0
    assert stats.mass_kept == pytest.approx(1.0, abs=1e-5)


def test_a_small_budget_gives_the_answers_of_the_cpu_runtime(needle, samples):
    results = []
    for model in (needle, load_needle("cpu")[0]):
        with IceRuntime.wrap(model, budget=128, dense_below=0) as runtime:
            results.append([answer(model, sample) for sample in samples])
            stats = runtime.stats()
        assert 48 < stats.attended_min <= stats.attended_max <= 128 + 1 + 15
        assert stats.pages_read > 0
    assert results[0] == results[1]
    # Or both could be equally lost.
    assert sum(a == s.answer for a, s in zip(results[0], samples, strict=True)) >= len(samples) - 1


def test_keys_stay_near_on_the_device_and_far_on_the_host(needle):
    ids = torch.randint(4, 100, (1, LENGTH), device=DEVICE)
    with IceRuntime.wrap(needle, budget=128, dense_below=0) as runtime:
        cache = runtime.new_cache()
        forward(needle, ids, cache)
        forward(needle, ids[:, :1], cache)
        for layer in cache.layers:
            assert layer.pages.near.keys.device.type == layer.pages.near.values.device.type == DEVICE.type
        stats = runtime.stats()
    assert stats.device_bytes < 0.2 * stats.host_bytes


def padded(model):
    return model.generate(**on_device(left_padded([120, 37, 70, 5])), max_new_tokens=30, do_sample=False)


def beams(model):
    ids = prompt(1, 90).to(DEVICE)
    return model.generate(ids, max_new_tokens=15, do_sample=False, num_beams=3, num_return_sequences=2)


def chunks(model):
    batch = on_device(left_padded([130, 50]))
    return model.generate(**batch, max_new_tokens=20, do_sample=False, prefill_chunk_size=48)


@pytest.mark.parametrize("dense_below", [0, 100])
@pytest.mark.parametrize("use", [padded, beams, chunks], ids=lambda use: use.__name__)
def test_every_way_to_generate_gives_the_tokens_of_dense_attention(use, dense_below):
    expected, got, stats = dense_and_ours(build("llama").to(DEVICE), use, dense_below=dense_below)
    assert stats.pages_read > 0
    assert torch.equal(expected, got)


@pytest.mark.parametrize("policy", ["page-oracle", "random"])
def test_the_other_policies_are_exact_too_when_the_budget_covers_the_context(policy):
    model, ids = build("llama").to(DEVICE), prompt(2, 200)
    dense = forward(model, ids, DynamicCache())[:, 190:]
    with IceRuntime.wrap(model, budget=1024, dense_below=0, policy=policy) as runtime:
        cache = runtime.new_cache()
        forward(model, ids[:, :190], cache)
        got = torch.cat([forward(model, ids[:, i : i + 1], cache) for i in range(190, 200)], 1)
        # Below the budget rows are read whole; under a small one the selectors themselves run.
        with_pages = runtime.stats().pages_read
    assert with_pages > 0
    assert (got - dense).abs().max() <= 1e-3 * dense.abs().max()
    with IceRuntime.wrap(model, budget=64, dense_below=0, policy=policy) as runtime:
        out = model.generate(ids.to(DEVICE), max_new_tokens=10, do_sample=False)
        assert out.shape == (2, 210)
        assert runtime.stats().attended_max <= 64 + 1 + 15


@pytest.mark.parametrize("n_cropped", [3, 60, 150])
def test_a_cropped_cache_goes_on_as_its_prefix_and_its_copy_as_if_nothing_had_been_cropped(n_cropped):
    model, ids, tail = build("llama").to(DEVICE), prompt(2, 220), prompt(2, 30, seed=5)
    kept = ids[:, : 220 - n_cropped]
    expected = forward(model, torch.cat([kept, tail], 1), DynamicCache())[:, -30:]
    whole = forward(model, torch.cat([ids, tail], 1), DynamicCache())[:, -30:]
    with IceRuntime.wrap(model, budget=1024, dense_below=0) as runtime:
        cache = runtime.new_cache()
        forward(model, ids[:, :200], cache)
        forward(model, ids[:, 200:], cache)
        twin = copy.deepcopy(cache)
        cache.crop(-n_cropped)
        got = [forward(model, tail[:, :20], cache), *(forward(model, tail[:, i : i + 1], cache) for i in range(20, 30))]
        other = [forward(model, tail[:, i : i + 1], twin) for i in range(30)]
    assert (torch.cat(got, 1) - expected).abs().max() <= 1e-3 * expected.abs().max()
    assert (torch.cat(other, 1) - whole).abs().max() <= 1e-3 * whole.abs().max()


def test_padding_in_a_step_of_one_token_is_dropped_here_too():
    """The mask is read once per step, also where that waits for the device."""
    model, ids = build("llama").to(DEVICE), prompt(2, 130)
    mask = torch.ones(2, 130, dtype=torch.long, device=DEVICE)
    mask[1, :40] = mask[1, 100:110] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    dense = forward(model, ids, DynamicCache(), attention_mask=mask, position_ids=positions)
    with IceRuntime.wrap(model, budget=1024, dense_below=0) as runtime:
        cache, got = runtime.new_cache(), []
        for first, last in [(0, 100), *((i, i + 1) for i in range(100, 130))]:
            step = {"attention_mask": mask[:, :last], "position_ids": positions[:, first:last]}
            got.append(forward(model, ids[:, first:last], cache, **step))
        assert cache.layers[0].pages.length(1) == 130 - 50
    real = mask.bool()
    assert (torch.cat(got, 1) - dense)[real].abs().max() <= 1e-3 * dense[real].abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_accurate_as_the_dense_model(dtype):
    exact, ids = build("llama").double().to(DEVICE), prompt(1, 140)

    def use(model):
        cache = DynamicCache()
        cuts = [(0, 80), (80, 100), *((i, i + 1) for i in range(100, 140))]
        return torch.cat([forward(model, ids[:, a:b], cache).double() for a, b in cuts], 1)

    truth = use(exact)
    dense, got, stats = dense_and_ours(exact.to(dtype), use)
    assert stats.pages_read > 0
    assert (got - truth).abs().mean() <= 1.5 * (dense - truth).abs().mean()


def test_the_shipped_model_answers_in_bfloat16_under_a_small_budget(samples):
    model = load_needle(DEVICE, torch.bfloat16)[0]
    with IceRuntime.wrap(model, budget=128, dense_below=0) as runtime:
        right = sum(answer(model, sample) == sample.answer for sample in samples)
        assert runtime.stats().pages_read > 0
    assert right >= len(samples) - 1


@pytest.mark.parametrize("dense_below", [0, 4096], ids=["paged", "short"])
def test_nothing_stays_on_the_device_when_the_caches_are_gone(dense_below):
    model, ids = build("llama").to(DEVICE), prompt(2, 300)

    def use(runtime):
        cache = runtime.new_cache()
        forward(model, ids, cache)
        twin = copy.deepcopy(cache)
        for i in range(20):
            forward(model, ids[:, i : i + 1], cache)
        forward(model, ids[:, :40], twin)
        return torch.cuda.memory_allocated()

    with IceRuntime.wrap(model, dense_below=dense_below, budget=128) as runtime:
        use(runtime)  # library workspaces and the counters of the runtime are made by the first use
        gc.collect()
        start = torch.cuda.memory_allocated()
        gc.disable()
        try:
            assert use(runtime) > start
            assert torch.cuda.memory_allocated() == start
        finally:
            gc.enable()


def test_a_prompt_that_finds_no_room_is_an_error_and_the_cache_is_as_before():
    """Prompts leave a GPU in the background: what fails there must come out of the forward that brought them."""
    model, ids = build("llama").to(DEVICE), prompt(1, 400)
    with IceRuntime.wrap(model, budget=64, window_tokens=32, dense_below=0, host_memory=1 << 14) as runtime:
        cache = runtime.new_cache()
        with pytest.raises(PoolExhaustedError):
            forward(model, ids, cache)
        assert cache.get_seq_length() == 0
        forward(model, ids[:, :60], cache)
        assert cache.get_seq_length() == 60


def test_a_prompt_with_infinite_keys_is_an_error_that_names_the_layer():
    model, ids = build("llama").to(DEVICE), prompt(1, 100)
    with torch.no_grad():
        model.model.layers[1].self_attn.k_proj.weight[0, 0] = float("inf")
    with IceRuntime.wrap(model, budget=64, dense_below=0) as runtime, pytest.raises(BadTensorError, match="layer 1"):
        forward(model, ids, runtime.new_cache())
