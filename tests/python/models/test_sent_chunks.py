"""Later chunks of a prompt that leave for the pages layer by layer, against chunks that wait for the end of their step.

Only GPUs do that by default; here the background thread also takes them from a CPU.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from icecache import IceRuntime, PoolExhaustedError
from icecache.errors import BadTensorError
from icecache.hf import group
from icecache.hf.cache import RetrievalLayer
from icecache.pages import chunk
from icecache.select import Services
from tiny import build, left_padded, prompt

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
SMALL = {"dense_below": 0, "threads": 1, "budget": 96}
CUTS = [0, 150, 290, 291, 292, 470, 471, 520]


@pytest.fixture
def sent(monkeypatch):
    """Chunks of 64 tokens or more are sent; returns how often that was."""
    calls, restored = [], chunk.Before.restore

    def send(*arguments):
        calls.append("sent")
        chunk.send_chunk(*arguments)

    def restore(*arguments):
        calls.append("restored")
        restored(*arguments)

    monkeypatch.setattr(Services, "offload_from", lambda services, _device: services.offload)
    monkeypatch.setattr(group, "LONG_CHUNK_TOKENS", 64)
    monkeypatch.setattr(group, "send_chunk", send)
    monkeypatch.setattr(chunk.Before, "restore", restore)
    return calls


def forward(model, ids, cache, **kwargs):
    with torch.no_grad():
        return model(ids, past_key_values=cache, use_cache=True, **kwargs).logits


def in_chunks(runtime, ids, cuts=CUTS, mask=None):
    """Logits of every chunk, and the digests of all forests at the end."""
    cache, out = runtime.new_cache(), []
    for first, stop in itertools.pairwise(cuts):
        options = {} if mask is None else {"attention_mask": mask[:, :stop]}
        out.append(forward(runtime.model, ids[:, first:stop], cache, **options))
    runtime._services.drain([x.pages for x in cache.layers if getattr(x, "pages", None) is not None])
    return out, digests(cache)


def digests(cache):
    for layer in cache.layers:
        for b, forest in enumerate(layer.pages.forests):
            forest.validate()
            assert layer.pages.length(b) == int(layer.pages.padding.valid()[b].sum())
    return [forest.digest() for layer in cache.layers for forest in layer.pages.forests]


def same(a, b):
    return a[1] == b[1] and all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True))


def waiting(**settings):
    """Ids and mask of a ragged batch, and what chunks that wait make of them: logits and digests."""
    batch = left_padded([150, 90], seed=2)
    more = prompt(2, 370, seed=3)
    ids = torch.cat([batch["input_ids"], more], 1).to(DEVICE)
    mask = torch.cat([batch["attention_mask"], torch.ones_like(more)], 1).to(DEVICE)
    mask[1, 200:230] = 0
    with IceRuntime.wrap(build("llama").to(DEVICE), **{**SMALL, **settings}, decode="eager") as runtime:
        return ids, mask, in_chunks(runtime, ids, mask=mask)


@pytest.fixture(params=[1, 2, 3])
def ragged(request):
    return request.param, *waiting(reuse=request.param)


def test_sent_chunks_give_the_same_bits_in_the_same_pages(ragged, sent):
    reuse, ids, mask, expected = ragged
    with IceRuntime.wrap(build("llama").to(DEVICE), **SMALL, decode="eager", reuse=reuse) as runtime:
        assert same(in_chunks(runtime, ids, mask=mask), expected)
    assert sent == ["sent"] * 2 * -(-3 // reuse)


@pytest.fixture(params=[1, 2])
def covered(request):
    return request.param, *waiting(budget=4096, reuse=request.param)


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_chunk_that_dies_half_way_is_undone_in_the_pages_too(covered, sent, error):
    reuse, ids, mask, expected = covered
    model = build("llama").to(DEVICE)
    with IceRuntime.wrap(model, **{**SMALL, "budget": 4096}, decode="eager", reuse=reuse) as runtime:
        cache, out = runtime.new_cache(), []
        for first, stop in itertools.pairwise(CUTS):
            chunk_ids, options = ids[:, first:stop], {"attention_mask": mask[:, :stop]}
            if stop == 470:

                def die(*_):
                    raise error

                handle = model.model.layers[2].mlp.register_forward_pre_hook(die)
                with pytest.raises(error):
                    forward(model, chunk_ids, cache, **options)
                handle.remove()
                assert cache.get_seq_length() == first
            out.append(forward(model, chunk_ids, cache, **options))
        runtime._services.drain([x.pages for x in cache.layers])
        digests(cache)
    # Rows that had been sent and were cut again lie in other pages: the same tokens, not the same bits.
    real = mask[:, : CUTS[-1], None].bool()
    a, b = (torch.cat(x, 1) * real for x in (out, expected[0]))
    assert (a - b).abs().max() <= 1e-4 * b.abs().max()


@pytest.mark.parametrize("reuse", [1, 3])
def test_a_chunk_with_infinite_keys_is_undone_in_all_layers(sent, reuse):
    model, ids = build("llama").to(DEVICE), prompt(2, 520).to(DEVICE)
    options = {**SMALL, "budget": 4096, "decode": "eager", "reuse": reuse}
    with IceRuntime.wrap(model, **options) as runtime:
        expected, _ = in_chunks(runtime, ids, [0, 150, 400, 401])
    with IceRuntime.wrap(model, **options) as runtime:
        cache = runtime.new_cache()
        forward(model, ids[:, :150], cache)
        before = [len(x.pages.forests[0]) for x in cache.layers]
        sent.clear()
        projection = model.model.layers[1].self_attn.k_proj
        projection.bias = torch.nn.Parameter(torch.full((32,), torch.inf, device=DEVICE))
        with pytest.raises(BadTensorError, match="layer 1"):
            forward(model, ids[:, 150:400], cache)
        projection.bias = None
        assert "restored" in sent
        assert cache.get_seq_length() == 150
        assert [len(x.pages.forests[0]) for x in cache.layers] == before
        digests(cache)
        got = [forward(model, ids[:, a:b], cache) for a, b in ((150, 400), (400, 401))]
    for a, b in zip(got, expected[1:], strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()


def test_the_limit_of_host_memory_ends_a_chunk_and_not_the_sequence(sent, monkeypatch):
    model, ids = build("llama").to(DEVICE), prompt(1, 900).to(DEVICE)
    with IceRuntime.wrap(model, **SMALL, decode="eager", host_memory=600_000) as runtime:
        monkeypatch.setattr(runtime._hooks, "_check_memory", lambda *_: None)
        cache = runtime.new_cache()
        forward(model, ids[:, :200], cache)
        with pytest.raises(PoolExhaustedError):
            forward(model, ids[:, 200:900], cache)
        assert "restored" in sent
        assert cache.get_seq_length() == 200
        digests(cache)
        forward(model, ids[:, 200:300], cache)
        assert cache.get_seq_length() == 300
        digests(cache)


def test_layers_whose_keys_others_may_need_wait_for_the_end_of_their_step(sent, monkeypatch):
    model, ids = build("llama").to(DEVICE), prompt(1, 520).to(DEVICE)
    finish = RetrievalLayer.finish

    def shared(layer):
        finish(layer)
        layer.may_be_shared = True

    monkeypatch.setattr(RetrievalLayer, "finish", shared)
    with IceRuntime.wrap(model, **SMALL, decode="eager") as runtime:
        in_chunks(runtime, ids)
    assert not sent
