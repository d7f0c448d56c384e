"""Attention over parts of the keys, merged by log-sum-exp, against float64 softmax attention over all of them."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from icecache.attention import Partial, merge, partial_attention, with_sink_logits


def reference(query, keys, values, scaling, mask=None, softcap=None, sinks=None):
    """Plain float64 attention: (out, lse); rows without a live key give zeros and -inf."""
    logits = torch.einsum("bhgqd,bhnd->bhgqn", query.double(), keys.double()) * scaling
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        extra = sinks.double().view(1, *query.shape[1:3], 1, 1).expand(*logits.shape[:-1], 1)
        logits = torch.cat([logits, extra], -1)
        values = torch.cat([values.double(), torch.zeros_like(values[:, :, :1]).double()], 2)
    lse = torch.logsumexp(logits, -1)
    weights = torch.softmax(logits, -1).nan_to_num(0.0)
    return torch.einsum("bhgqn,bhnd->bhgqd", weights, values.double()), lse


def tensors(seed, rows=2, heads=2, group=3, queries=4, n=37, dim=16, value_dim=12, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    query = torch.randn(rows, heads, group, queries, dim, generator=g)
    keys = torch.randn(rows, heads, n, dim, generator=g) * 2
    values = torch.randn(rows, heads, n, value_dim, generator=g)
    return query.to(dtype), keys.to(dtype), values.to(dtype)


def assert_close(part, expected):
    out, lse = expected
    assert part.out.dtype == part.lse.dtype == torch.float32
    assert (part.out.double() - out).abs().max() <= 1e-5
    assert torch.equal(part.lse == float("-inf"), lse == float("-inf"))
    live = lse > float("-inf")
    assert not live.any() or (part.lse.double() - lse)[live].abs().max() <= 1e-5


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_part_is_softmax_attention(dtype, softcap):
    query, keys, values = tensors(0, dtype=dtype)
    got = partial_attention(query, keys, values, scaling=0.25, softcap=softcap)
    assert_close(got, reference(query, keys, values, 0.25, softcap=softcap))


@given(
    seed=st.integers(0, 2**32 - 1),
    cuts=st.lists(st.integers(0, 37), max_size=4),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    softcap=st.sampled_from([None, 2.0]),
    with_sinks=st.booleans(),
)
def test_merged_parts_are_attention_over_the_whole_wherever_it_is_cut(seed, cuts, density, softcap, with_sinks):
    query, keys, values = tensors(seed)
    g = torch.Generator().manual_seed(seed)
    mask = torch.rand(2, 2, 1, 4, 37, generator=g) < density
    sinks = torch.randn(6, generator=g) * 3 if with_sinks else None
    edges = [0, *sorted(cuts), 37]
    parts = [
        partial_attention(query, keys[:, :, a:b], values[:, :, a:b], scaling=0.5, mask=mask[..., a:b], softcap=softcap)
        for a, b in itertools.pairwise(edges)
    ]
    got = merge(parts)
    if sinks is not None:
        got = with_sink_logits(got, sinks)
    assert_close(got, reference(query, keys, values, 0.5, mask, softcap, sinks))


def test_large_logits_neither_overflow_nor_vanish():
    query, keys, values = tensors(1)
    got = partial_attention(query * 200, keys, values, scaling=1.0)
    out, _ = reference(query * 200, keys, values, 1.0)
    assert got.out.isfinite().all()
    assert (got.out - out).abs().max() <= 1e-3


def test_a_part_without_live_keys_changes_nothing():
    query, keys, values = tensors(2)
    whole = partial_attention(query, keys, values, scaling=0.5)
    nothing = partial_attention(query, keys[:, :, :0], values[:, :, :0], scaling=0.5)
    hidden = partial_attention(query, keys, values, scaling=0.5, mask=torch.zeros(37, dtype=torch.bool))
    for empty in (nothing, hidden):
        assert torch.equal(empty.out, torch.zeros_like(empty.out))
        both = merge([empty, whole])
        assert torch.equal(both.lse, whole.lse)
        assert torch.equal(both.out, whole.out)
    all_empty = merge([nothing, hidden])
    assert torch.equal(all_empty.out, torch.zeros_like(all_empty.out))
    assert (all_empty.lse == float("-inf")).all()


def test_a_very_negative_sink_changes_nothing_and_a_very_large_one_takes_all():
    query, keys, values = tensors(3)
    part = partial_attention(query, keys, values, scaling=0.5)
    assert torch.equal(with_sink_logits(part, torch.full((6,), -1e9)).out, part.out)
    assert with_sink_logits(part, torch.full((6,), 1e4)).out.abs().max() == 0
    empty = Partial(torch.zeros_like(part.out), torch.full_like(part.lse, float("-inf")))
    assert with_sink_logits(empty, torch.zeros(6)).out.abs().max() == 0
