"""`wrap` and `unwrap`: nothing is left behind, a failed wrap changes nothing, a cache is used only where it belongs."""

from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from icecache import CacheStateError, ConfigError, IceConfig, IceRuntime, UnsupportedModelError
from icecache.hf.names import cache_argument
from tiny import BUILDERS, build, prompt
from transformers import (
    BertConfig,
    BertForMaskedLM,
    DynamicCache,
    LlamaForCausalLM,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)


def fingerprint(model):
    """Everything that wrapping could leave behind."""
    return (
        model.config._attn_implementation,
        model.config.to_json_string(use_diff=False),
        [(name, len(m._forward_hooks), len(m._forward_pre_hooks)) for name, m in model.named_modules()],
        sorted(vars(model)),
        sorted(vars(model.config)),
    )


def greedy(model, cache=None):
    return model.generate(prompt(1, 120), max_new_tokens=8, do_sample=False, past_key_values=cache)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", BUILDERS)
def test_unwrap_restores_the_model_exactly(family, implementation):
    model = build(family)
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        logits = model(prompt(1, 60)).logits
    before = fingerprint(model)
    runtime = IceRuntime.wrap(model, dense_below=0)
    greedy(model)
    assert fingerprint(model) != before
    assert runtime.unwrap() is model
    assert runtime.unwrap() is model
    assert fingerprint(model) == before
    with torch.no_grad():
        assert torch.equal(model(prompt(1, 60)).logits, logits)


def test_the_block_unwraps_after_an_error_too():
    model = build("llama")
    before = fingerprint(model)
    with pytest.raises(ZeroDivisionError), IceRuntime.wrap(model):
        raise ZeroDivisionError
    assert fingerprint(model) == before


def _encoder_decoder():
    sizes = {"d_model": 32, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 4, "vocab_size": 99}
    return T5ForConditionalGeneration(T5Config(**sizes))


def _sliding_only():
    model = build("gemma3")
    model.config.layer_types = ["sliding_attention"] * 4
    return model


@pytest.mark.parametrize(
    ("make", "settings", "error", "reason"),
    [
        (_encoder_decoder, {}, UnsupportedModelError, "encoder-decoder"),
        (_sliding_only, {}, UnsupportedModelError, "DynamicSlidingWindowLayer"),
        (lambda: build("llama"), {"dense_layers": (0, 1, 2)}, UnsupportedModelError, "no layer with plain full"),
        (lambda: build("llama"), {"dense_layers": (3,)}, ConfigError, r"0\.\.=2, got 3"),
        (lambda: build("llama"), {"policy": "best"}, ConfigError, "policy must be one of icecache, page-oracle"),
        (lambda: build("llama"), {"budgets": 3}, ConfigError, "unknown settings: budgets"),
        (lambda: build("llama"), {"budget": 50}, ConfigError, "48, 64"),
    ],
)
def test_a_failed_wrap_says_why_and_leaves_the_model_untouched(make, settings, error, reason):
    model = make()
    before = fingerprint(model)
    with pytest.raises(error, match=reason):
        IceRuntime.wrap(model, **settings)
    assert fingerprint(model) == before


def test_a_wrapped_model_is_not_wrapped_again_and_stays_wrapped():
    model = build("llama")
    with IceRuntime.wrap(model, dense_below=0) as runtime:
        before = fingerprint(model)
        with pytest.raises(CacheStateError, match="wrapped already"):
            IceRuntime.wrap(model)
        assert fingerprint(model) == before
        greedy(model)
        assert runtime.stats().pages_read > 0


def test_a_cache_is_refused_after_unwrap_by_the_model_and_by_another_runtime():
    model = build("llama")
    with IceRuntime.wrap(model, dense_below=0) as runtime:
        cache = runtime.new_cache()
        greedy(model, cache)
    with pytest.raises(CacheStateError, match="unwrapped IceRuntime"):
        greedy(model, cache)
    with IceRuntime.wrap(model), pytest.raises(CacheStateError, match="unwrapped IceRuntime"):
        greedy(model, cache)
    for use in (runtime.new_cache, lambda: runtime.generate(prompt(1, 9)), lambda: runtime.adopt(DynamicCache())):
        with pytest.raises(CacheStateError, match="was unwrapped"):
            use()


def test_a_cache_of_another_model_is_refused():
    model, other = build("llama"), build("llama", seed=1)
    with IceRuntime.wrap(model, dense_below=0) as runtime:
        cache = runtime.new_cache()
        greedy(model, cache)
        length = cache.get_seq_length()
        with pytest.raises(CacheStateError, match="only usable through the model"):
            greedy(other, cache)
        with IceRuntime.wrap(other, dense_below=0), pytest.raises(CacheStateError, match="another IceRuntime"):
            greedy(other, cache)
        assert cache.get_seq_length() == length


def test_a_model_that_shares_the_config_object_is_not_affected():
    model = build("llama")
    twin = type(model)(model.config).eval()
    expected = greedy(twin)
    with IceRuntime.wrap(model, dense_below=0) as runtime:
        assert torch.equal(greedy(twin), expected)
        assert runtime.stats().pages_read == 0


def test_unwrap_in_the_middle_of_generation_is_a_clear_error():
    model = build("llama")
    runtime = IceRuntime.wrap(model, dense_below=0)
    seen = []

    def stop(_ids, _scores, **_):
        seen.append(1)
        if len(seen) == 3:
            runtime.unwrap()
        return torch.zeros(1, dtype=torch.bool)

    with pytest.raises(CacheStateError, match="unwrapped"):
        model.generate(prompt(1, 90), max_new_tokens=10, do_sample=False, stopping_criteria=[stop])
    assert len(seen) == 3


@pytest.mark.parametrize("dense_below", [0, 4096], ids=["paged", "short"])
def test_caches_are_freed_without_the_garbage_collector(dense_below):
    model = build("llama")
    with IceRuntime.wrap(model, dense_below=dense_below) as runtime:
        gc.collect()
        gc.disable()
        try:
            cache = runtime.new_cache()
            greedy(model, cache)
            layer = weakref.ref(cache.layers[0])
            assert runtime.stats().device_bytes > 0
            assert (runtime.stats().host_bytes > 0) == (dense_below == 0)
            del cache
            assert layer() is None
            assert runtime.stats().device_bytes == runtime.stats().host_bytes == 0
        finally:
            gc.enable()


def test_a_runtime_does_not_keep_its_model_alive_through_the_registries():
    model = build("llama")
    held = weakref.ref(model)
    IceRuntime.wrap(model, dense_below=0).unwrap()
    del model
    gc.collect()
    assert held() is None


def test_other_ways_to_call_a_wrapped_model_stay_dense_and_exact():
    model = build("llama")
    ids = prompt(1, 90)
    with torch.no_grad():
        bare = model(ids).logits
        inner = model.model(ids).last_hidden_state
        uncached = model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False)
        static = model.generate(ids, max_new_tokens=6, do_sample=False, cache_implementation="static")
        own = model(ids, past_key_values=StaticCache(config=model.config, max_cache_len=128)).logits
        filled = DynamicCache()
        model(ids, past_key_values=filled)
        with IceRuntime.wrap(model, dense_below=0) as runtime:
            assert torch.equal(model(ids).logits, bare)
            assert torch.equal(model.model(ids).last_hidden_state, inner)
            assert torch.equal(model.generate(ids, max_new_tokens=6, do_sample=False, use_cache=False), uncached)
            again = model.generate(ids, max_new_tokens=6, do_sample=False, cache_implementation="static")
            assert torch.equal(again, static)
            assert type(filled.layers[0]).__name__ == "DynamicLayer"
            model(prompt(1, 1), past_key_values=filled)
            cache = StaticCache(config=model.config, max_cache_len=128)
            assert torch.equal(model(ids, past_key_values=cache).logits, own)
            assert runtime.stats().pages_read == 0


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_the_cache_is_found_under_both_of_its_names(name):
    class Renamed(LlamaForCausalLM):
        def forward(self, input_ids, **kwargs):
            return super().forward(input_ids, **cache_argument(kwargs.pop(name)), **kwargs)

    model, ids = Renamed(build("llama").config).eval(), prompt(1, 120)
    with IceRuntime.wrap(model, dense_below=0) as runtime, torch.no_grad():
        cache = runtime.new_cache()
        model(ids, **{name: cache})
        model(prompt(1, 1), **{name: cache})
        assert runtime.stats().pages_read > 0


def test_a_cache_under_an_unknown_name_is_refused_instead_of_staying_dense():
    class Renamed(LlamaForCausalLM):
        def forward(self, input_ids, kv=None, **kwargs):
            return super().forward(input_ids, **cache_argument(kv), **kwargs)

    model = Renamed(build("llama").config).eval()
    with IceRuntime.wrap(model, dense_below=0) as runtime, torch.no_grad():
        with pytest.raises(UnsupportedModelError, match="argument 'kv', expected cache or past_key_values"):
            model(prompt(1, 20), kv=runtime.new_cache())
        with pytest.raises(UnsupportedModelError, match="argument 'kv'"):
            model(prompt(1, 20), runtime.new_cache())
        assert model(prompt(1, 20), kv=None).logits.shape[1] == 20


def test_dense_layers_stay_dense_beside_paged_ones_also_with_padding():
    from tiny import left_padded

    model, batch = build("llama"), left_padded([150, 60])
    expected = model.generate(**batch, max_new_tokens=30, do_sample=False, prefill_chunk_size=64)
    with IceRuntime.wrap(model, dense_below=0, budget=1024, dense_layers=(1,)) as runtime:
        assert runtime.layer_plan == ("retrieval", "DynamicLayer", "retrieval")
        got = model.generate(**batch, max_new_tokens=30, do_sample=False, prefill_chunk_size=64)
        assert runtime.stats().pages_read > 0
    assert torch.equal(expected, got)


def test_an_encoder_is_refused_at_its_first_forward():
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = BertForMaskedLM(BertConfig(**sizes, vocab_size=99)).eval()
    with IceRuntime.wrap(model, dense_below=0) as runtime:
        cache = runtime.new_cache()
        with pytest.raises((UnsupportedModelError, TypeError)), torch.no_grad():
            model(prompt(1, 20), past_key_values=cache)


def test_settings_come_from_a_config_and_overrides_win():
    model = build("llama")
    with IceRuntime.wrap(model, IceConfig(budget=128, dense_below=0), budget=96) as runtime:
        assert runtime.config == IceConfig(budget=96, dense_below=0)


def test_stats_can_be_read_while_another_thread_makes_caches():
    with IceRuntime.wrap(build("llama"), budget=64) as runtime:
        failed: list[RuntimeError] = []
        done = threading.Event()

        def read() -> None:
            try:
                while not done.is_set():
                    runtime.stats()
            except RuntimeError as error:
                failed.append(error)

        reader = threading.Thread(target=read)
        reader.start()
        kept = [runtime.new_cache() for _ in range(400)]
        done.set()
        reader.join()
        assert not failed
        assert len(kept) == 400
