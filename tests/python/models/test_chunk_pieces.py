"""Later chunks whose past arrives in pieces, as on a GPU, against dense attention.

On a CPU the pages are gathered in Triton's interpreter.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from icecache import IceRuntime
from icecache.hf import hooks
from icecache.hf.cache import RetrievalLayer
from icecache.kernels import page_gather
from icecache.select import Services
from icecache.transfer import pieces
from tiny import build, prompt
from transformers import DynamicCache

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
SMALL = {"dense_below": 0, "threads": 1, "budget": 64, "decode": "eager"}


@pytest.fixture(autouse=True)
def opened(monkeypatch):
    """All pages can be read, in short pieces; returns the cuts of each row of each chunk."""
    cuts, cut = [], pieces.piece_cuts

    def note(n_tokens, most):
        cuts.append(cut(n_tokens, most, 24))
        return cuts[-1]

    if not GPU:
        monkeypatch.setattr(Services, "reads_pages", lambda services, pages: services.stores.owns(pages.store))
        monkeypatch.setattr(page_gather, "PROGRAMS", 1)
    monkeypatch.setattr(pieces, "PIECE_BYTES", 1 << 14)
    monkeypatch.setattr(pieces, "piece_cuts", note)
    return cuts


def forward(model, ids, cache, **kwargs):
    with torch.no_grad():
        return model(ids, past_key_values=cache, use_cache=True, **kwargs).logits


def close(got, dense, real=None):
    real = torch.ones(got.shape[:2], dtype=torch.bool) if real is None else real
    return (got - dense)[real].abs().max() <= 1e-4 * dense[real].abs().max()


@pytest.mark.parametrize(("family", "reuse"), [("llama", 1), ("llama", 3), ("gemma3", 1)])
def test_chunks_equal_dense_attention(family, reuse, opened):
    model, ids = build(family).to(DEVICE), prompt(1, 230).to(DEVICE)
    dense = forward(model, ids, DynamicCache(config=model.config))
    with IceRuntime.wrap(model, **SMALL, reuse=reuse) as runtime:
        cache = runtime.new_cache()
        got = torch.cat([forward(model, x, cache) for x in ids.split([100, 60, 20, 50], 1)], 1)
    assert close(got, dense)
    assert max(map(len, opened)) >= 3


def test_rows_of_a_batch_with_padding_keep_apart():
    model, ids = build("llama").to(DEVICE), prompt(2, 200).to(DEVICE)
    mask = torch.ones(2, 200, dtype=torch.long, device=DEVICE)
    mask[1, :70] = mask[1, 120:132] = 0
    mask[0, 150:180] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    dense = forward(model, ids, DynamicCache(), attention_mask=mask, position_ids=positions)
    with IceRuntime.wrap(model, **SMALL) as runtime:
        cache, got = runtime.new_cache(), []
        for first, last in ((0, 110), (110, 150), (150, 180), (180, 200)):
            step = {"attention_mask": mask[:, :last], "position_ids": positions[:, first:last]}
            got.append(forward(model, ids[:, first:last], cache, **step))
    assert close(torch.cat(got, 1), dense, mask.bool())


def test_a_custom_mask_inside_a_chunk_is_honoured(monkeypatch):
    monkeypatch.setattr("icecache.attention.attend.LOGIT_BYTES", 4000)
    model, ids = build("llama").to(DEVICE), prompt(1, 130).to(DEVICE)
    mask = torch.ones(1, 1, 130, 130, dtype=torch.bool, device=DEVICE).tril()
    mask[..., 110:120, 110:120] = True
    dense = forward(model, ids, DynamicCache(), attention_mask=mask)[:, 100:]
    with IceRuntime.wrap(model, **SMALL) as runtime:
        cache = runtime.new_cache()
        forward(model, ids[:, :100], cache)
        got = forward(model, ids[:, 100:], cache, attention_mask=mask[:, :, 100:])
    assert close(got, dense)


def test_a_short_past_without_pages_is_one_piece(opened):
    model, ids = build("llama").to(DEVICE), prompt(1, 60).to(DEVICE)
    dense = forward(model, ids, DynamicCache())
    with IceRuntime.wrap(model, **SMALL) as runtime:
        cache = runtime.new_cache()
        got = torch.cat([forward(model, x, cache) for x in ids.split([5, 15, 40], 1)], 1)
    assert close(got, dense)
    assert opened[0] == []


def test_pages_that_were_read_are_let_go_at_the_end_of_a_step(monkeypatch):
    model, ids = build("llama").to(DEVICE), prompt(1, 300).to(DEVICE)
    with IceRuntime.wrap(model, **SMALL) as runtime:
        cache = runtime.new_cache()
        for part in ids.split(100, 1):
            forward(model, part, cache)
            assert not runtime._services.reader._held
        stats = runtime.stats()
        assert stats.bytes_to_device > 0

        def die(*_):
            raise RuntimeError

        monkeypatch.setattr(RetrievalLayer, "finish", die)
        with pytest.raises(RuntimeError):
            forward(model, part, cache)
        assert not runtime._services.reader._held
        assert cache.get_seq_length() == 300


def test_pieces_cover_everything_and_grow_slowly():
    for n, most in ((0, 100), (1, 100), (24, 100), (25, 100), (1000, 100), (1000, 10), (1000, 4000)):
        cuts = pieces.piece_cuts(n, most)
        assert [t for first, stop in cuts for t in range(first, stop)] == list(range(n))
        sizes = [stop - first for first, stop in cuts]
        assert all(b <= min(1.5 * a, most) for a, b in itertools.pairwise(sizes))


def test_a_prompt_that_does_not_fit_the_device_names_the_remedy(monkeypatch):
    monkeypatch.setattr(hooks, "_LONG_PROMPT_TOKENS", 100)
    model, ids = build("llama").to(DEVICE), prompt(1, 150).to(DEVICE)

    def full(*_):
        raise torch.OutOfMemoryError

    with IceRuntime.wrap(model, **SMALL) as runtime:
        cache = runtime.new_cache()
        handle = model.model.layers[1].mlp.register_forward_pre_hook(full)
        with (
            pytest.warns(RuntimeWarning, match="150 tokens.*prefill_chunk_size=100"),
            pytest.raises(torch.OutOfMemoryError),
        ):
            forward(model, ids, cache)
        handle.remove()
        assert cache.get_seq_length() == 0
        forward(model, ids, cache)
