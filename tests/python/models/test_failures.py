"""What goes wrong, and what then happens: a typed error, and a sequence that is as it was before the step."""

from __future__ import annotations

import copy

import pytest
import torch
from icecache import CacheStateError, IceCacheError, IceRuntime, PoolExhaustedError, UnsupportedModelError
from icecache.errors import BadTensorError
from icecache.pages import NearBuffer
from icecache.pages.padding import PaddingLog
from tiny import build, left_padded, prompt
from transformers import DynamicCache


def forward(model, ids, cache, **kwargs):
    with torch.no_grad():
        return model(ids, past_key_values=cache, use_cache=True, **kwargs).logits


def decode(model, ids, cache):
    """Feed tokens one by one from where the cache stands."""
    for i in range(cache.get_seq_length(), ids.shape[1]):
        forward(model, ids[:, i : i + 1], cache)


def snapshot(cache):
    """Length and every token held, per layer and row."""
    state = []
    for layer in cache.layers:
        pages = layer.pages
        rows = [pages.near.row(b) for b in range(pages.n_rows)]
        near = [torch.cat([r.sink_keys, r.window_keys], 1).clone() for r in rows]
        state.append((layer.get_seq_length(), [len(f) for f in pages.forests], near))
    return state


def same(a, b):
    return all(
        x[:2] == y[:2] and all(torch.equal(p, q) for p, q in zip(x[2], y[2], strict=True))
        for x, y in zip(a, b, strict=True)
    )


class Poison:
    """Forward hook that spoils the output of a projection for one row."""

    def __init__(self, module, row, value, position=0):
        self.row, self.value, self.position = row, value, position
        self.handle = module.register_forward_hook(self)

    def __call__(self, _module, _args, output):
        output = output.clone()
        output[self.row, self.position] = self.value
        return output

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.handle.remove()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_bad_key_in_a_prompt_names_layer_and_row_and_leaves_an_empty_usable_cache(value):
    model, ids = build("llama"), prompt(3, 200)
    expected = forward(model, ids, DynamicCache())
    with IceRuntime.wrap(model, dense_below=0) as runtime:
        cache = runtime.new_cache()
        attention = model.model.layers[1].self_attn
        with Poison(attention.k_proj, 2, value, 60), pytest.raises(BadTensorError, match="layer 1, row 2: keys"):
            forward(model, ids, cache)
        assert cache.get_seq_length() == 0
        assert runtime.stats().host_bytes == 0
        assert torch.equal(forward(model, ids, cache), expected)


def test_a_bad_query_in_a_decode_step_names_layer_and_row_and_the_step_can_be_repeated():
    model, ids = build("llama"), prompt(2, 200)
    with IceRuntime.wrap(model, budget=64, dense_below=0) as runtime:
        cache = runtime.new_cache()
        forward(model, ids[:, :198], cache)
        before, twin = snapshot(cache), copy.deepcopy(cache)
        q_proj = model.model.layers[2].self_attn.q_proj
        with Poison(q_proj, 1, float("nan")), pytest.raises(BadTensorError, match="layer 2, row 1: queries"):
            forward(model, ids[:, 198:199], cache)
        assert same(before, snapshot(cache))
        assert torch.equal(forward(model, ids[:, 198:199], cache), forward(model, ids[:, 198:199], twin))


def test_a_bad_key_of_a_decoded_token_is_refused_before_it_enters_the_index():
    model, ids = build("llama"), prompt(1, 260)
    with IceRuntime.wrap(model, budget=4096, dense_below=0) as runtime:
        cache = runtime.new_cache()
        forward(model, ids[:, :200], cache)
        sizes = [len(layer.pages.forests[0]) for layer in cache.layers]
        with Poison(model.model.layers[0].self_attn.k_proj, 0, float("nan")):
            forward(model, ids[:, 200:201], cache)
        with pytest.raises(BadTensorError, match="layer 0, row 0: keys"):
            decode(model, ids, cache)
        for layer, n in zip(cache.layers, sizes, strict=True):
            layer.pages.forests[0].validate()
            assert len(layer.pages.forests[0]) == n + 32  # its 32 elders moved, its own 16 stay in the window


def test_running_out_of_host_memory_in_decode_leaves_the_sequence_as_it_was():
    model, ids = build("llama"), prompt(1, 400)
    with IceRuntime.wrap(model, dense_below=0, budget=4096) as runtime:
        cache = runtime.new_cache()
        forward(model, ids[:, :200], cache)
        limit = runtime.stats().host_bytes + 3 * 4096 * 6
    with IceRuntime.wrap(model, dense_below=0, budget=4096, host_memory=limit) as runtime:
        cache = runtime.new_cache()
        forward(model, ids[:, :200], cache)
        with pytest.raises(PoolExhaustedError, match=r"\d+") as caught:
            decode(model, ids, cache)
        assert isinstance(caught.value, MemoryError)
        reached = cache.get_seq_length()
        assert 200 < reached < 400
        tokens = snapshot(cache)
        with pytest.raises(PoolExhaustedError):
            forward(model, ids[:, reached : reached + 1], cache)
        assert same(tokens, snapshot(cache))
        for layer in cache.layers:
            assert layer.pages.length(0) == reached
        cache.crop(-(reached - 180))
        got = forward(model, ids[:, 180:185], cache)
    dense = forward(model, ids[:, :185], DynamicCache())[:, 180:]
    assert (got - dense).abs().max() <= 1e-4 * dense.abs().max()


def test_a_chunk_that_cannot_fit_is_refused_before_it_starts_with_the_bytes():
    model, ids = build("llama"), prompt(1, 2000)
    with IceRuntime.wrap(model, dense_below=0, host_memory=200_000) as runtime:
        cache = runtime.new_cache()
        forward(model, ids[:, :200], cache)
        before = snapshot(cache)
        with pytest.raises(PoolExhaustedError, match="a chunk of 1500 tokens needs") as caught:
            forward(model, ids[:, 200:1700], cache)
        assert caught.value.needed_bytes > caught.value.available_bytes > 0
        assert same(before, snapshot(cache))
        forward(model, ids[:, 200:201], cache)
        assert runtime.stats().steps == 1


def test_a_prompt_that_cannot_fit_leaves_an_empty_usable_cache():
    model = build("llama")
    with IceRuntime.wrap(model, dense_below=0, host_memory=100_000) as runtime:
        cache = runtime.new_cache()
        with pytest.raises(PoolExhaustedError):
            forward(model, prompt(1, 2000), cache)
        assert cache.get_seq_length() == 0
        assert runtime.stats().host_bytes == 0
        forward(model, prompt(1, 100), cache)
        assert cache.get_seq_length() == 100


class Interrupt:
    """Raise at one module, as Ctrl-C would."""

    def __init__(self, module, error):
        self.error = error
        self.handle = module.register_forward_pre_hook(self)

    def __call__(self, *_):
        raise self.error

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.handle.remove()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("worker died")], ids=["ctrl-c", "exception"])
@pytest.mark.parametrize("dense_below", [0, 4096], ids=["paged", "short"])
@pytest.mark.parametrize("n_new", [1, 30])
def test_a_step_that_dies_half_way_is_undone(error, dense_below, n_new):
    model, ids = build("llama"), prompt(1, 260)
    with IceRuntime.wrap(model, budget=4096, dense_below=dense_below) as runtime:
        cache = runtime.new_cache()
        forward(model, ids[:, :200], cache)
        twin = copy.deepcopy(cache)
        with Interrupt(model.model.layers[1].mlp, error), pytest.raises(type(error)):
            forward(model, ids[:, 200 : 200 + n_new], cache)
        assert [layer.get_seq_length() for layer in cache.layers] == [200] * 3
        got = forward(model, ids[:, 200 : 200 + n_new], cache)
        assert torch.equal(got, forward(model, ids[:, 200 : 200 + n_new], twin))


def test_running_out_of_device_memory_while_the_window_grows_loses_no_token(monkeypatch):
    model, ids = build("llama"), prompt(1, 260)
    with IceRuntime.wrap(model, budget=4096, dense_below=0) as runtime:
        cache = runtime.new_cache()
        forward(model, ids[:, :200], cache)
        twin, before, calls = copy.deepcopy(cache), snapshot(cache), []
        inner = NearBuffer.append

        def append(self, keys, values):
            calls.append(1)
            if len(calls) == 2:  # in the second layer, once
                raise torch.OutOfMemoryError("out of memory")
            inner(self, keys, values)

        monkeypatch.setattr(NearBuffer, "append", append)
        with pytest.raises(torch.OutOfMemoryError):
            forward(model, ids[:, 200:201], cache)
        assert same(before, snapshot(cache))
        assert torch.equal(forward(model, ids[:, 200:201], cache), forward(model, ids[:, 200:201], twin))


def test_ctrl_c_between_a_token_and_the_record_of_its_position_is_undone(monkeypatch):
    model, ids = build("llama"), prompt(2, 203)
    with IceRuntime.wrap(model, budget=4096, dense_below=0) as runtime:
        cache = runtime.new_cache()
        forward(model, ids[:, :200], cache)
        twin, calls, append = copy.deepcopy(cache), [], PaddingLog.append

        def interrupted(log, *arguments):
            calls.append(1)
            if len(calls) == 2:  # in the second layer, once
                raise KeyboardInterrupt
            append(log, *arguments)

        monkeypatch.setattr(PaddingLog, "append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            forward(model, ids[:, 200:201], cache)
        assert cache.get_seq_length() == 200
        for t in range(200, 203):
            assert torch.equal(forward(model, ids[:, t : t + 1], cache), forward(model, ids[:, t : t + 1], twin))


def test_generate_continues_after_ctrl_c_as_if_nothing_had_happened():
    model = build("llama")
    ids = prompt(1, 120)
    expected = model.generate(ids, max_new_tokens=20, do_sample=False)
    with IceRuntime.wrap(model, budget=4096, dense_below=0) as runtime:
        cache = runtime.new_cache()
        so_far = model.generate(ids, past_key_values=cache, max_new_tokens=7, do_sample=False)
        with Interrupt(model.model.layers[2], KeyboardInterrupt()), pytest.raises(KeyboardInterrupt):
            model.generate(so_far, past_key_values=cache, max_new_tokens=13, do_sample=False)
        got = model.generate(so_far, past_key_values=cache, max_new_tokens=13, do_sample=False)
    assert torch.equal(expected, got)


def test_a_hybrid_sequence_that_cannot_be_undone_says_so_instead_of_going_on():
    model, ids = build("gemma3"), prompt(1, 130)
    with IceRuntime.wrap(model, dense_below=0) as runtime:
        cache = runtime.new_cache()
        forward(model, ids[:, :120], cache)
        with Interrupt(model.model.layers[2], RuntimeError("died")), pytest.raises(RuntimeError, match="died"):
            forward(model, ids[:, 120:121], cache)
        with pytest.raises(CacheStateError, match="the sequence is lost: layer 0"):
            forward(model, ids[:, 120:121], cache)


def test_gradients_are_refused_with_the_remedy():
    model = build("llama")
    with IceRuntime.wrap(model, dense_below=0) as runtime:
        with pytest.raises(UnsupportedModelError, match=r"torch\.no_grad"):
            model(prompt(1, 40), past_key_values=runtime.new_cache())
        loss = model(prompt(1, 40), labels=prompt(1, 40)).loss  # without our cache training goes on as ever
        loss.backward()


def test_a_wrong_batch_size_or_dtype_is_refused_and_changes_nothing():
    model = build("llama")
    with IceRuntime.wrap(model, dense_below=0) as runtime:
        cache = runtime.new_cache()
        forward(model, prompt(2, 100), cache)
        before = snapshot(cache)
        with pytest.raises(CacheStateError, match="the cache has 2 rows, got keys of 3"):
            forward(model, prompt(3, 1), cache)
        model.half()
        with pytest.raises(BadTensorError, match=r"torch\.float32 .* torch\.float16"):
            forward(model, prompt(2, 1), cache)
        assert same(before, snapshot(cache))


def test_a_cache_in_double_precision_is_refused():
    model = build("llama").double()
    with IceRuntime.wrap(model, dense_below=0) as runtime, pytest.raises(UnsupportedModelError, match="float64"):
        forward(model, prompt(1, 40), runtime.new_cache())


def test_every_error_is_one_of_ours():
    assert issubclass(BadTensorError, IceCacheError)
    assert issubclass(PoolExhaustedError, (IceCacheError, MemoryError))
    assert issubclass(CacheStateError, IceCacheError)


def test_rows_of_padding_only_are_served():
    model, batch = build("llama"), left_padded([90, 90])
    batch["attention_mask"][1, :89] = 0
    expected = model.generate(**batch, max_new_tokens=30, do_sample=False)
    with IceRuntime.wrap(model, budget=1024, dense_below=0) as runtime:
        got = model.generate(**batch, max_new_tokens=30, do_sample=False)
        assert runtime.stats().attended_min == 2
    assert torch.equal(expected, got)
