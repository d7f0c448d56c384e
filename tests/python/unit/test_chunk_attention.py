"""A chunk of a prompt against float64 attention to everything before it and to itself."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from icecache.attention import Inside, attend, library
from icecache.attention.chunk import chunk_attention
from icecache.kernels.part_attention import part_attention_ref

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


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize(("n_queries", "n_keys", "causal"), [(5, 40, False), (40, 40, True), (7, 40, True)])
def test_a_part_is_attended_to_and_folded_on_every_device(softcap, n_queries, n_keys, causal, monkeypatch):
    monkeypatch.setattr(attend, "LOGIT_BYTES", 2000)
    query, keys, values, onto = part_case(n_queries, n_keys)
    options = {"softcap": softcap, "causal": causal}
    for earlier in (None, onto):
        expected = part_attention_ref(query, keys, values, 0.3, **options, onto=earlier)
        given = None if earlier is None else tuple(t.clone() for t in earlier)
        got = attend.attend(query, keys, values, scaling=0.3, **options, onto=given)
        for ours, truth in zip(got, expected, strict=True):
            torch.testing.assert_close(ours.double(), truth, atol=1e-5, rtol=0)


def part_case(n_queries, n_keys, seed=5):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(DEVICE)  # noqa: E731
    query = draw(2, n_queries, 3, 16).transpose(1, 2)
    onto = draw(2, 3, n_queries, 16), draw(2, 3, n_queries)
    return query, draw(2, n_keys, 16), draw(2, n_keys, 16), onto


@pytest.mark.gpu
def test_a_library_takes_parts_whose_length_comes_again():
    make = {"dtype": torch.bfloat16, "device": "cuda"}
    query, keys, values = torch.randn(2, 3, 100, 128, **make), *torch.randn(2, 2, 300, 128, **make)
    if not library.serves(query, values, None):
        pytest.skip("cuDNN has no fast kernel for this device")
    first = attend.attend(query, keys[:, :50], values[:, :50], scaling=0.1)
    ours = attend.attend(query, keys, values, scaling=0.1, onto=tuple(t.clone() for t in first))
    theirs = attend.attend(query, keys, values, scaling=0.1, onto=first, planned=True)
    torch.testing.assert_close(ours[0], theirs[0], atol=1e-2, rtol=0)
    torch.testing.assert_close(ours[1], theirs[1], atol=1e-3, rtol=0)
    assert not torch.equal(ours[0], theirs[0])


@pytest.mark.gpu
def test_the_library_gives_output_and_log_sum_exp_of_the_kernel():
    make = {"dtype": torch.bfloat16, "device": "cuda"}
    query, keys, values = torch.randn(2, 100, 4, 128, **make).transpose(1, 2), *torch.randn(2, 2, 300, 128, **make)
    if not library.serves(query, values, None):
        pytest.skip("cuDNN has no fast kernel for this device")
    exact = part_attention_ref(query, keys, values, 0.1)
    plain = part_attention_ref(query, keys, values, 0.1, dtype=torch.bfloat16)
    for got, theirs, truth in zip(library.library_attention(query, keys, values, 0.1), plain, exact, strict=True):
        assert (got.double() - truth).abs().max() <= 2 * (theirs.double() - truth).abs().max() + 1e-5
