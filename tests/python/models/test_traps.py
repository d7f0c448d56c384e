"""One test for each trap of the transformers interfaces that silently gave wrong results or crashed a prototype."""

from __future__ import annotations

import pytest
import torch
from icecache import IceRuntime, UnsupportedModelError
from icecache.hf import IMPLEMENTATION, RetrievalLayer
from shrink import build_tiny
from tiny import build, prompt
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    GptOssConfig,
    GptOssForCausalLM,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING


def forward(model, ids, cache, **kwargs):
    with torch.no_grad():
        return model(ids, past_key_values=cache, use_cache=True, **kwargs).logits


def stepwise(model, ids, cache):
    cuts = [(0, 90), (90, 91), (91, 110), *((i, i + 1) for i in range(110, ids.shape[1]))]
    return torch.cat([forward(model, ids[:, a:b], cache) for a, b in cuts], 1)


def served_exactly(model, n_tokens=140, **settings):
    """Logits of the wrapped model equal the plain ones, and pages were read."""
    ids = prompt(2, n_tokens)
    expected = stepwise(model, ids, DynamicCache(config=model.config.get_text_config(decoder=True)))
    with IceRuntime.wrap(model, budget=4096, dense_below=0, **settings) as runtime:
        got = stepwise(model, ids, runtime.new_cache())
        assert runtime.stats().pages_read > 0
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_the_name_does_not_belong_to_a_family_that_transformers_matches_by_substring():
    assert not any(part in IMPLEMENTATION for part in ("flash", "sdpa", "flex", "eager", "/"))


def test_logit_softcapping_is_applied_in_pages_window_and_streamed_chunks():
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    options = {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 97, "sliding_window": 24}
    config = Gemma2Config(**sizes, **options, initializer_range=0.4, attn_logit_softcapping=2.0)
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(config).eval()
    model.set_attn_implementation("eager")
    served_exactly(model)


def test_softcapping_is_left_out_where_the_model_s_own_attention_leaves_it_out():
    """Old releases load this model with sdpa, which ignores it: prompt and decode steps may not disagree."""
    served_exactly(tiny("VaultGemmaForCausalLM"))


def test_learned_attention_sinks_take_their_share():
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    options = {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 97, "num_local_experts": 2}
    kinds = ["sliding_attention", "full_attention"]
    config = GptOssConfig(**sizes, **options, num_experts_per_tok=1, layer_types=kinds, sliding_window=24)
    torch.manual_seed(0)
    model = GptOssForCausalLM(config).eval()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks, mean=1.0)
    served_exactly(model)


def tiny(name):
    """Tiny model of a class, by name."""
    for config_class, models in MODEL_FOR_CAUSAL_LM_MAPPING.items():
        for model_class in models if isinstance(models, tuple) else (models,):
            if model_class.__name__ == name:
                return build_tiny(config_class, model_class)
    pytest.skip(f"{name} is not in this transformers")


def test_values_that_are_transformed_after_the_cache_are_refused_or_dense(monkeypatch):
    model, ids = build("llama"), prompt(1, 80)
    expected = forward(model, ids, DynamicCache())
    inner = RetrievalLayer.update

    def transformed(self, *args, **kwargs):
        key, value = inner(self, *args, **kwargs)
        return key, value * 1.0

    monkeypatch.setattr(RetrievalLayer, "update", transformed)
    with (
        IceRuntime.wrap(model, dense_below=0) as runtime,
        pytest.raises(UnsupportedModelError, match="layer 0: values"),
    ):
        forward(model, ids, runtime.new_cache())
    with IceRuntime.wrap(model, dense_below=0, on_unsupported="dense") as runtime:
        cache = runtime.new_cache()
        got = torch.cat([forward(model, ids[:, :70], cache), forward(model, ids[:, 70:], cache)], 1)
        assert all(type(layer).__name__ == "DynamicLayer" for layer in cache.layers)
        assert runtime.layer_plan == ("DynamicLayer",) * 3  # what is dense is said to be dense
    assert (got - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("MiniCPM3ForCausalLM", "latent KV"),
        ("DogeForCausalLM", "differs between heads"),
        ("JetMoeForCausalLM", "layer 0"),
        ("BertLMHeadModel", "not causal"),
        ("GitForCausalLM", "never reached the attention function"),
    ],
)
@pytest.mark.parametrize("dense_below", [0, 4096])
def test_attention_that_cannot_be_served_is_refused_at_the_first_forward(name, reason, dense_below):
    model = tiny(name)
    with IceRuntime.wrap(model, dense_below=dense_below) as runtime, pytest.raises(UnsupportedModelError, match=reason):
        forward(model, prompt(1, 60), runtime.new_cache())


def test_a_caller_s_extra_argument_is_harmless_but_one_that_attention_adds_is_not(monkeypatch):
    model, ids = build("llama"), prompt(1, 80)
    with IceRuntime.wrap(model, budget=1024, dense_below=0) as runtime:
        cache = runtime.new_cache()
        forward(model, ids, cache, tokenizer=object())  # `transformers serve` lets it leak down
        module = type(model.model.layers[0].self_attn)
        inner = module.forward

        def biased(self, *args, **kwargs):
            return inner(self, *args, **kwargs, position_bias=torch.zeros(1))

        monkeypatch.setattr(module, "forward", biased)
        with pytest.raises(UnsupportedModelError, match="position_bias"):
            forward(model, ids[:, :1], cache)


def test_keys_that_are_copied_on_the_way_are_noticed(monkeypatch):
    model, ids = build("llama"), prompt(1, 80)
    inner = RetrievalLayer.update

    def copied(self, *args, **kwargs):
        key, value = inner(self, *args, **kwargs)
        return key.clone(), value

    monkeypatch.setattr(RetrievalLayer, "update", copied)
    with (
        IceRuntime.wrap(model, dense_below=0) as runtime,
        pytest.raises(UnsupportedModelError, match="never reached the attention function unchanged"),
    ):
        forward(model, ids, runtime.new_cache())


def test_reading_keys_directly_is_an_error_and_not_none():
    with IceRuntime.wrap(build("llama")) as runtime:
        layer = runtime.new_cache().layers[0]
        for name in ("keys", "values"):
            with pytest.raises(UnsupportedModelError, match="layer 0: something reads the dense keys"):
                getattr(layer, name)


def test_the_length_grows_in_update_and_counts_padding(monkeypatch):
    lengths = []
    inner = RetrievalLayer.attend

    def attend(self, call):
        lengths.append(self.get_seq_length())
        return inner(self, call)

    monkeypatch.setattr(RetrievalLayer, "attend", attend)
    model, mask = build("llama"), torch.ones(2, 70, dtype=torch.long)
    mask[1, :50] = 0
    with IceRuntime.wrap(model, dense_below=0) as runtime:
        cache = runtime.new_cache()
        forward(model, prompt(2, 70), cache, attention_mask=mask)
        assert lengths == [70] * 3
        assert cache.get_seq_length() == 70
        assert cache.layers[0].get_max_cache_shape() == cache.layers[0].get_max_length() == -1


def test_a_decode_step_builds_no_mask_of_context_length(monkeypatch):
    from icecache.hf import attention as seam

    built = []
    inner = seam.mask
    monkeypatch.setitem(seam.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, IMPLEMENTATION, inner)

    def watched(**kwargs):
        result = inner(**kwargs)
        built.append((kwargs["q_length"], None if result is None else tuple(result.shape)))
        return result

    model, ids = build("llama"), prompt(1, 120)
    with IceRuntime.wrap(model, dense_below=0) as runtime:
        monkeypatch.setitem(seam.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, IMPLEMENTATION, watched)
        cache = runtime.new_cache()
        forward(model, ids[:, :100], cache, attention_mask=torch.ones(1, 100))
        forward(model, ids[:, 100:101], cache, attention_mask=torch.ones(1, 101))
        forward(model, ids[:, 101:], cache, attention_mask=torch.ones(1, 120))
        monkeypatch.setitem(seam.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, IMPLEMENTATION, inner)
    assert built[1:] == [(1, (1, 101)), (19, (1, 120))]


def test_a_model_that_reads_the_cache_behind_our_back_is_refused():
    """Mllama does in recent releases; where one does not, it must be served exactly."""
    model, refusals = tiny("MllamaForCausalLM"), []
    try:
        served_exactly(model)
    except UnsupportedModelError as error:
        refusals.append(str(error))
    assert all("layer 0: something reads the dense keys or values" in refusal for refusal in refusals)


@pytest.mark.parametrize("sparse_prefill", [False, True])
def test_keys_shared_between_layers_are_attended_but_stored_once(sparse_prefill):
    kinds = ["sliding_attention", "full_attention"] * 3
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4}
    options = {"num_key_value_heads": 2, "head_dim": 16, "vocab_size": 97, "vocab_size_per_layer_input": 97}
    extra = {"hidden_size_per_layer_input": 8, "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 6}
    config = Gemma3nTextConfig(
        **sizes, **options, **extra, layer_types=kinds, sliding_window=24, num_kv_shared_layers=4
    )
    torch.manual_seed(0)
    model = Gemma3nForCausalLM(config).eval()
    torch.nn.init.normal_(model.lm_head.weight)
    served_exactly(model, sparse_prefill=sparse_prefill)
    with IceRuntime.wrap(model, dense_below=0) as runtime:
        forward(model, prompt(1, 200), runtime.new_cache())
        assert runtime.layer_plan.count("retrieval") == 1


def test_saving_a_wrapped_model_leaves_no_trace_of_us(tmp_path):
    model = build("llama")
    expected = model.generate(prompt(1, 40), max_new_tokens=5, do_sample=False)
    with IceRuntime.wrap(model, dense_below=0):
        model.save_pretrained(tmp_path)
    assert IMPLEMENTATION not in (tmp_path / "config.json").read_text()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded.generation_config.eos_token_id = None
    assert torch.equal(loaded.generate(prompt(1, 40), max_new_tokens=5, do_sample=False), expected)


def test_positional_arguments_reach_the_cache():
    model, ids = build("llama"), prompt(1, 80)
    with IceRuntime.wrap(model, dense_below=0) as runtime, torch.no_grad():
        cache = runtime.new_cache()
        model(ids, None, None, cache)
        assert cache.get_seq_length() == 80
        model(ids[:, :1], None, None, cache)
        assert runtime.stats().steps == 1


def test_threads_share_a_wrapped_model_without_mixing_their_steps():
    from concurrent.futures import ThreadPoolExecutor

    model = build("llama")
    prompts = [prompt(1, 100 + 20 * i, seed=i) for i in range(4)]
    expected = [model.generate(ids, max_new_tokens=20, do_sample=False) for ids in prompts]
    with IceRuntime.wrap(model, budget=4096, dense_below=0), ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(model.generate, ids, max_new_tokens=20, do_sample=False) for ids in prompts]
        got = [future.result() for future in futures]
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
