"""What goes wrong around a decode step in a CUDA graph, and what then happens; every test takes seconds."""

from __future__ import annotations

import copy
import gc
import importlib
import zlib

import pytest
import torch
from icecache import CacheStateError, EngineError, IceRuntime, PoolExhaustedError
from icecache.config import PAGE_TOKENS
from icecache.eval.needle import load_needle, make_samples
from icecache.pages import as_bytes
from test_graph_steps import with_device_steps
from test_pinned_memory import Stop
from tiny import build, prompt
from transformers import DynamicCache

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
SMALL = {"dense_below": 0, "threads": 1, "budget": 64}


def generate(model, ids, n_new=40, **options):
    return model.generate(ids.to(DEVICE), max_new_tokens=n_new, do_sample=False, **options)


def checksums(keys, values):
    """One of each token of ``[H, n, D]`` keys and values."""
    rows = [torch.cat([k, v], -1).contiguous() for k, v in zip(keys.unbind(1), values.unbind(1), strict=True)]
    return [zlib.crc32(as_bytes(row)) for row in rows]


def stored(forest, like):
    """Checksums of what the pages hold, in order of position."""
    shape = (forest.n_kv_heads, len(forest))
    keys, values = torch.empty(*shape, like.keys.shape[3]), torch.empty(*shape, like.values.shape[3])
    forest.read(0, len(forest), as_bytes(keys), as_bytes(values))
    return checksums(keys, values), keys


@pytest.mark.parametrize("search", ["gpu", "cpu"])
def test_two_thousand_generated_tokens_lie_in_the_pages_as_they_left_the_device(monkeypatch, search):
    """Inserts, splits and seals beside graph steps; a token's checksum on its way is that of its place at the end."""
    model = load_needle(DEVICE)[0]
    sample = make_samples("kv32", 1024, 1, seed=5)[0]
    ids, moved = torch.tensor([sample.prompt], device=DEVICE), {}

    def noting(insert):
        def note(pool, recorder, moves):
            insert(pool, recorder, moves)
            for move in moves:
                moved.setdefault(move.layer, []).extend(checksums(move.keys, move.values))

        return note

    for name in ("ahead", "build", "layer", "offload"):
        module = importlib.import_module(f"icecache.pages.{name}")
        monkeypatch.setattr(module, "insert", noting(module.insert))
    with IceRuntime.wrap(model, budget=128, dense_below=0, search=search) as runtime:
        cache = runtime.new_cache()
        out = generate(model, ids, 2000, min_new_tokens=2000, past_key_values=cache)
        assert runtime._hooks.decoder._captured
        runtime._services.drain([x.pages for x in cache.layers])
        n_tokens = out.shape[1] - 1  # the last one was never computed with
        first_keys = None
        for number, x in enumerate(cache.layers):
            (forest,), near = x.pages.forests, x.pages.near
            forest.validate()
            found, keys = stored(forest, near)
            assert found == moved[number][: len(found)]
            assert len(found) + near.count(0) == n_tokens
            assert len(found) >= n_tokens - 16 - 32 - 2 * PAGE_TOKENS
            first_keys = keys if number == 0 else first_keys
        assert forest.counters()["segments"] > 0
    # Keys of the first layer depend on a token and its position only: these are the right ones.
    dense = DynamicCache()
    with torch.no_grad():
        model(out[:, :-1], past_key_values=dense, logits_to_keep=1)
    expected = dense.layers[0].keys[0, :, 16 : 16 + first_keys.shape[1]].cpu()
    assert (first_keys - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("search", ["gpu", "cpu"])
def test_unwrap_in_the_middle_of_generate_is_a_clear_error_and_leaves_the_model_as_it_was(search):
    model, ids = build("llama").to(DEVICE), prompt(1, 120)
    expected = generate(model, ids)
    runtime, seen = IceRuntime.wrap(model, **SMALL, search=search), []

    def stop(_ids, _scores, **_):
        seen.append(1)
        if len(seen) == 5:
            assert runtime._hooks.decoder._captured
            runtime.unwrap()
        return torch.zeros(1, dtype=torch.bool, device=DEVICE)

    with pytest.raises(CacheStateError, match="unwrapped"):
        generate(model, ids, stopping_criteria=[stop])
    assert len(seen) == 5
    assert "forward" not in model.__dict__
    assert torch.equal(generate(model, ids), expected)


def test_ctrl_c_in_generate_leaves_a_sequence_that_goes_on():
    model, ids = build("llama").to(DEVICE), prompt(1, 120).to(DEVICE)
    with IceRuntime.wrap(model, **SMALL) as runtime:
        expected = generate(model, ids)
        cache = runtime.new_cache()
        with pytest.raises(KeyboardInterrupt):
            generate(model, ids, past_key_values=cache, logits_processor=[Stop()])
        n = cache.get_seq_length()
        assert 120 < n < 160
        got = generate(model, expected[:, : n + 1], n_new=160 - n - 1, past_key_values=cache)
        assert torch.equal(got, expected)


def test_a_killed_worker_fails_its_generation_only():
    models, ids = [build("llama", seed).to(DEVICE) for seed in (0, 1)], prompt(1, 120)
    with IceRuntime.wrap(models[0], **SMALL, decode="eager") as first, IceRuntime.wrap(models[1], **SMALL) as second:
        search = with_device_steps(first)
        expected = [generate(model, ids) for model in models]
        (held,) = search._boxes.values()
        held.box._fault((1, 0))  # a panic in the search of layer 1
        with pytest.raises(EngineError):
            generate(models[0], ids)
        assert torch.equal(generate(models[1], ids), expected[1])
        held.box._fault(None)
        gc.collect()
        assert torch.equal(generate(models[0], ids), expected[0])
        second.stats()


def test_an_exhausted_host_memory_limit_in_generate_leaves_the_sequence_and_others_usable():
    model, ids = build("llama").to(DEVICE), prompt(1, 300)
    with IceRuntime.wrap(model, **SMALL) as runtime:
        expected = generate(model, ids)
        used = runtime.stats().host_bytes
        cache = runtime.new_cache()
        generate(model, ids, n_new=2, past_key_values=cache)
        used = runtime.stats().host_bytes
        del cache
    with IceRuntime.wrap(model, **SMALL, host_memory=used + 10 * 4096) as runtime:
        cache = runtime.new_cache()
        with pytest.raises(PoolExhaustedError, match="bytes needed"):
            generate(model, ids, past_key_values=cache)
        n = cache.get_seq_length()
        assert 300 < n < 340
        twin = copy.deepcopy(cache)
        with pytest.raises(PoolExhaustedError):
            generate(model, expected[:, : n + 1], n_new=339 - n, past_key_values=cache)
        assert cache.get_seq_length() == twin.get_seq_length() == n
        del cache, twin
        gc.collect()
        assert torch.equal(generate(model, ids, n_new=10), expected[:, :310])


def test_two_models_take_turns_token_by_token():
    models, ids = [build("llama", seed).to(DEVICE) for seed in (0, 1)], prompt(1, 120).to(DEVICE)

    def steps(runtime, cache, tokens):
        with torch.no_grad():
            return torch.cat([runtime.model(ids[:, t : t + 1], past_key_values=cache).logits for t in tokens], 1)

    def started(model, search):
        runtime = IceRuntime.wrap(model, **SMALL, search=search)
        cache = runtime.new_cache()
        with torch.no_grad():
            model(ids[:, :80], past_key_values=cache)
        return runtime, cache

    kinds = ("gpu", "cpu")
    alone = []
    for model, search in zip(models, kinds, strict=True):
        runtime, cache = started(model, search)
        alone.append(steps(runtime, cache, range(80, 120)))
        runtime.unwrap()
    both = [started(model, search) for model, search in zip(models, kinds, strict=True)]
    together = [[], []]
    for t in range(80, 120):
        for out, (runtime, cache) in zip(together, both, strict=True):
            out.append(steps(runtime, cache, [t]))
    for runtime, _ in both:
        assert runtime._hooks.decoder._captured
        runtime.unwrap()
    for a, b in zip(alone, together, strict=True):
        assert (a - torch.cat(b, 1)).abs().max() <= 1e-4 * a.abs().max()
