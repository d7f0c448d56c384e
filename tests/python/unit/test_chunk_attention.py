"""A chunk of a prompt against float64 attention to everything before it and to itself."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from icecache.attention import Inside, chunk, library
from icecache.attention.chunk import chunk_attention

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def chunk_case(n_past=150, n_new=23, group=2, seed=3):
    """Two rows with pasts of different length: queries, keys and values of the chunk, and the pasts."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(DEVICE)  # noqa: E731
    query, keys, values = draw(2, 2 * group, n_new, 16), draw(2, 2, n_new, 16), draw(2, 2, n_new, 16)
    pasts = [(draw(2, n, 16), draw(2, n, 16)) for n in (n_past, n_past // 2)]
    return query, keys, values, pasts


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_a_chunk_equals_attention_to_its_past_and_to_itself(softcap, with_sinks):
    query, keys, values, pasts = chunk_case()
    sinks = torch.tensor([0.3, -1.0, 2.0, 4.0], device=DEVICE) if with_sinks else None
    pieces = [[(k[:, i : i + 40], v[:, i : i + 40]) for i in range(0, k.shape[1], 40)] for k, v in pasts]
    options = {"scaling": 0.3, "softcap": softcap, "sinks": sinks}
    got = chunk_attention(lambda b: nullcontext(pieces[b]), query, keys, values, Inside(), **options)
    for b, (k, v) in enumerate(pasts):
        everything, old = torch.cat([k, keys[b]], 1), k.shape[1]
        logits = query[b].view(2, 2, 23, 16).double() @ everything[:, None].double().transpose(-1, -2) * 0.3
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        seen = torch.ones(23, old + 23, dtype=torch.bool, device=DEVICE).tril(old)
        logits = logits.masked_fill(~seen, float("-inf"))
        if sinks is not None:
            logits = torch.cat([logits, sinks.double().view(2, 2, 1, 1).expand(2, 2, 23, 1)], -1)
        weights = logits.softmax(-1)[..., : old + 23]
        expected = weights @ torch.cat([v, values[b]], 1)[:, None].double()
        torch.testing.assert_close(got[b].double(), expected.permute(2, 0, 1, 3).flatten(1, 2), atol=1e-5, rtol=0)


def test_a_part_by_a_library_is_folded_like_our_own(monkeypatch):
    """Pieces of a length that comes again go to the library; here it is torch's softmax."""

    def library(query, keys, values, scaling):
        logits = query @ keys[:, None].transpose(-1, -2) * scaling
        lengths.append(keys.shape[1])
        return logits.softmax(-1) @ values[:, None], logits.logsumexp(-1)

    query, keys, values, pasts = chunk_case()
    pieces = [[(k[:, i : i + 40], v[:, i : i + 40]) for i in range(0, k.shape[1], 40)] for k, v in pasts]
    arguments = (lambda b: nullcontext(pieces[b]), query, keys, values, Inside())
    ours, lengths = chunk_attention(*arguments, scaling=0.3), []
    monkeypatch.setattr(chunk, "serves", lambda *_: True)
    monkeypatch.setattr(chunk, "library_attention", library)
    torch.testing.assert_close(chunk_attention(*arguments, scaling=0.3), ours, atol=1e-5, rtol=0)
    assert lengths == [40, 40]


@pytest.mark.gpu
def test_the_library_gives_output_and_log_sum_exp_of_the_kernel():
    from icecache.kernels.part_attention import part_attention_ref

    make = {"dtype": torch.bfloat16, "device": "cuda"}
    query, keys, values = torch.randn(2, 100, 4, 128, **make).transpose(1, 2), *torch.randn(2, 2, 300, 128, **make)
    if not library.serves(query, values, None):
        pytest.skip("cuDNN has no fast kernel for this device")
    exact = part_attention_ref(query, keys, values, 0.1)
    plain = part_attention_ref(query, keys, values, 0.1, dtype=torch.bfloat16)
    for got, theirs, truth in zip(library.library_attention(query, keys, values, 0.1), plain, exact, strict=True):
        assert (got.double() - truth).abs().max() <= 2 * (theirs.double() - truth).abs().max() + 1e-5
