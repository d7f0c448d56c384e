"""Decode steps of models that keep some layers dense, or sliding, on static buffers, against eager steps.

On a CPU the kernels run in Triton's interpreter and nothing is captured; on a GPU each step is a CUDA graph.
"""

from __future__ import annotations

import copy
import gc
import warnings

import pytest
import torch
from icecache import IceRuntime
from icecache.attention import DeviceSearch, static_kv
from icecache.hf.graph import GraphDecoder
from test_device_search import with_device_search
from test_graph_steps import both_ways, generate, with_device_steps
from tiny import build, left_padded, prompt
from transformers import GptOssConfig, GptOssForCausalLM

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
SMALL = {"dense_below": 0, "threads": 1, "budget": 64, "decode": "eager"}


@pytest.fixture(autouse=True)
def little_room(monkeypatch):
    """Buffers grow, and windows move, every few steps."""
    monkeypatch.setattr(static_kv, "ROOM_COLUMNS", 1)
    monkeypatch.setattr(static_kv, "ROOM_PART", 1 << 30)


def close(a, b):
    return (a - b).abs().max() <= 1e-4 * a.abs().max()


def steps(runtime, ids, first, stop):
    """Logits of tokens first .. stop, one by one, behind a prompt."""
    model = runtime.model
    with torch.no_grad():
        cache = runtime.new_cache()
        model(ids[:, :first], past_key_values=cache)
        out = [model(ids[:, t : t + 1], past_key_values=cache).logits[:, -1] for t in range(first, stop)]
    runtime.stats()
    return torch.cat(out), cache


def test_dense_layers_are_part_of_the_step():
    """The paper's setting: the first layers dense, the others share pages."""
    inputs = left_padded([90, 70])
    (eager, ours), search = both_ways("llama", inputs, budget=64, dense_layers=(0,), reuse=2)
    assert search.steps > 0
    assert torch.equal(eager[0], ours[0])
    assert close(eager[1], ours[1])


@pytest.mark.gpu
def test_dense_layers_beside_the_search_on_the_device():
    model, ids, stop = build("llama").to(DEVICE), prompt(1, 190).to(DEVICE), 190
    with IceRuntime.wrap(model, **SMALL, dense_layers=(1,)) as runtime:
        eager, _ = steps(runtime, ids, 150, stop)
        search = with_device_search(runtime)
        ours, cache = steps(runtime, ids, 150, stop)
        assert search.steps == stop - 150
        (step,) = runtime._hooks.decoder._steps.values()
        (buffer,) = step.static.layers
        assert cache.layers[1].keys.untyped_storage().data_ptr() == buffer.keys.untyped_storage().data_ptr()
    assert close(eager, ours)
    assert cache.layers[1].keys.shape[2] == stop
    assert cache.layers[1].keys.untyped_storage().data_ptr() != buffer.keys.untyped_storage().data_ptr()


def test_windows_that_slide_are_part_of_the_step():
    """A window of 24: it is full, moves along its buffer, and moves back."""
    model, ids = build("gemma3").to(DEVICE), prompt(1, 100).to(DEVICE)
    stop = 100 if GPU else 73
    with IceRuntime.wrap(model, **SMALL) as runtime:
        eager, _ = steps(runtime, ids, 70, stop)
        search = with_device_steps(runtime)
        ours, cache = steps(runtime, ids, 70, stop)
        assert search.steps == stop - 70
        assert cache.layers[0].keys.shape[2] == 23
        assert cache.layers[0].get_seq_length() == stop
    assert close(eager, ours)


def test_windows_that_are_not_full_yet_and_padded_rows():
    inputs = left_padded([22, 9])
    use = lambda model, batch: generate(model, batch, n_new=12 if GPU else 3)  # noqa: E731
    (eager, ours), search = both_ways("gemma3", inputs, budget=64, sink_tokens=0, window_tokens=16, use=use)
    assert search.steps > 0
    assert torch.equal(eager[0], ours[0])
    assert close(eager[1], ours[1])


def gpt_oss():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 2, "num_local_experts": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts_per_tok": 1}
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 24}
    tokens = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    config = GptOssConfig(**sizes, **heads, **kinds, **tokens, **rope, initializer_range=0.3)
    model = GptOssForCausalLM._from_config(config, attn_implementation="eager").eval()
    for layer in model.model.layers:
        layer.self_attn.sinks.data.normal_(2.0, 1.0)
    return model


def test_learned_sinks_take_their_share():
    model, ids = gpt_oss().to(DEVICE), prompt(1, 110).to(DEVICE)
    with IceRuntime.wrap(model, **SMALL) as runtime:
        eager, _ = steps(runtime, ids, 100, 103)
        search = with_device_steps(runtime)
        ours, _ = steps(runtime, ids, 100, 103)
        assert runtime._hooks.decoder.refused is None
        assert search.steps == 3
        for layer in model.model.layers:
            layer.self_attn.sinks.data.fill_(-1e4)
        without, _ = steps(runtime, ids, 100, 103)
    assert close(eager, ours)
    assert not close(without, ours)


PIECES = [(0, (100, 101)), (1, (100, 101)), (0, "crop"), (0, (98, 99)), (0, (99, 104)), (1, "copy"), (1, (101, 102))]


def test_crops_copies_chunks_and_other_sequences_are_seen_by_the_next_step():
    model, ids = build("llama").to(DEVICE), prompt(2, 120).to(DEVICE)

    def run(runtime):
        caches, out = [runtime.new_cache() for _ in range(2)], []
        with torch.no_grad():
            for row, cache in enumerate(caches):
                model(ids[row : row + 1, :100], past_key_values=cache)
            for row, piece in PIECES:
                if piece == "crop":
                    caches[row].crop(-3)
                elif piece == "copy":
                    twin, caches[row] = caches[row], copy.deepcopy(caches[row])
                    out += [model(ids[row : row + 1, 110:111], past_key_values=twin).logits[:, -1]]
                else:
                    out += [model(ids[row : row + 1, slice(*piece)], past_key_values=caches[row]).logits[:, -1]]
        return torch.cat(out)

    with IceRuntime.wrap(model, **SMALL, dense_layers=(0, 2)) as runtime:
        eager = run(runtime)
        search = with_device_steps(runtime)
        ours = run(runtime)
    assert search.steps == 5
    assert close(eager, ours)


def test_padding_between_tokens_runs_op_by_op_without_giving_up():
    model, ids = build("llama").to(DEVICE), prompt(2, 110).to(DEVICE)
    mask = torch.ones(2, 110, dtype=torch.long, device=DEVICE)
    mask[1, 90:95] = 0

    def run(runtime):
        cache = runtime.new_cache()
        with torch.no_grad():
            model(ids[:, :100], past_key_values=cache, attention_mask=mask[:, :100])
            return model(ids[:, 100:101], past_key_values=cache, attention_mask=mask[:, :101]).logits

    with IceRuntime.wrap(model, **SMALL, dense_layers=(0,)) as runtime, warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        eager = run(runtime)
        search = with_device_steps(runtime)
        assert torch.equal(run(runtime), eager)
        assert search.steps == 0
        assert runtime._hooks.decoder.refused is None


def test_attention_that_is_neither_causal_nor_sliding_is_refused_with_a_reason(monkeypatch):
    """Chunked attention keeps its layers in sliding caches, too, but sees other tokens."""
    model = build("gemma3").to(DEVICE)
    for layer in model.model.layers:
        layer.self_attn.sliding_window = None
    with IceRuntime.wrap(model, **SMALL) as runtime:
        eager, _ = steps(runtime, prompt(1, 102).to(DEVICE), 100, 102)
        search = with_device_steps(runtime)
        with pytest.warns(UserWarning, match="run op by op, which is slower: .*layer 0: chunked attention"):
            ours, cache = steps(runtime, prompt(1, 102).to(DEVICE), 100, 102)
        assert search.steps == 0
        assert runtime._hooks.decoder.device_bytes() == 0
    assert torch.equal(eager, ours)
    assert cache.layers[0].get_seq_length() == 102


@pytest.mark.gpu
def test_a_dropped_sequence_leaves_its_buffers_to_the_next_and_unwrap_frees_them():
    model, ids = build("llama").to(DEVICE), prompt(1, 200).to(DEVICE)
    with IceRuntime.wrap(model, **SMALL, dense_layers=(0,)) as runtime:
        with_device_search(runtime)
        _, cache = steps(runtime, ids, 150, 160)
        n_bytes = runtime._hooks.decoder.device_bytes()
        del cache
        gc.collect()
        steps(runtime, ids, 150, 160)
        assert runtime._hooks.decoder.device_bytes() == n_bytes
    assert runtime._hooks.decoder.device_bytes() == 0


@pytest.mark.gpu
def test_three_hundred_steps_with_dense_layers_give_the_tokens_of_eager_steps():
    model, ids = build("llama").to(DEVICE), prompt(2, 100).to(DEVICE)
    tokens = []
    for decode in ("eager", "auto"):
        options = {**SMALL, "decode": decode, "budget": 4096, "dense_layers": (0,), "reuse": 2}
        with IceRuntime.wrap(model, **options) as runtime:
            tokens.append(model.generate(ids, max_new_tokens=300, do_sample=False))
            if decode == "auto":
                assert isinstance(runtime._hooks.decoder, GraphDecoder)
                assert isinstance(runtime._hooks.decoder.search, DeviceSearch)
                assert runtime._hooks.decoder.refused is None
    assert torch.equal(*tokens)
