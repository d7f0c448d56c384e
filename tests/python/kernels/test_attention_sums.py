"""Sums of attention over a prompt against one softmax over the whole matrix in float64."""

from __future__ import annotations

import pytest
import torch
from icecache.kernels.attention_sums import attention_sums, attention_sums_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def some(shape, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(*shape, generator=generator)).to(DEVICE, dtype)


def check(query, keys, valid, softcap):
    scale = query.shape[-1] ** -0.5
    got = attention_sums(query, keys, valid, scale, softcap)
    expected = attention_sums_ref(query, keys, valid, scale, softcap)
    plain = attention_sums_ref(query, keys, valid, scale, softcap, dtype=torch.float32)
    bound = 2 * (plain.double() - expected).abs().max() + 1e-5 * expected.max()
    assert (got.double() - expected).abs().max() <= bound


@pytest.mark.parametrize(
    ("n_queries", "n_keys", "group", "dim", "softcap"),
    [(70, 70, 2, 16, None), (33, 150, 1, 24, None), (130, 190, 4, 64, 5.0), (1, 5, 3, 32, None)],
)
def test_the_sums_are_those_of_one_softmax(n_queries, n_keys, group, dim, softcap):
    check(some((2, 2, group, n_queries, dim)), some((2, 2, n_keys, dim), 1), None, softcap)


def test_wide_heads_take_smaller_tiles():
    check(some((1, 1, 1, 40, 256)), some((1, 1, 40, 256), 1), None, None)


def test_padding_gets_nothing_and_gives_nothing():
    valid = torch.ones(2, 140, dtype=torch.bool, device=DEVICE)
    valid[0, :75] = False
    valid[1, 100:120] = False
    query, keys = some((2, 2, 2, 100, 32)), some((2, 2, 140, 32), 1)
    check(query, keys, valid, None)
    sums = attention_sums(query, keys, valid, 0.2, None)
    assert (sums.masked_select(~valid[:, None].expand(sums.shape)) == 0).all()
    # Every valid query gives away exactly one.
    n_valid = valid[:, 40:].sum(1).float() * 2
    assert torch.allclose(sums.sum(-1), n_valid[:, None].expand(2, 2), rtol=1e-4)


def test_keys_need_not_be_packed():
    keys = some((2, 90, 2, 32), 1).transpose(1, 2)
    check(some((2, 2, 2, 90, 32)), keys, None, None)


def test_tensors_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="does not fit keys"):
        attention_sums(some((1, 2, 1, 9, 16)), some((1, 2, 8, 16)), None, 1.0, None)


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [64, 128])
def test_bfloat16_on_a_device(dim):
    shape = (2, 2, 4, 700, dim)
    check(some(shape, dtype=torch.bfloat16), some((2, 2, 1000, dim), 1, torch.bfloat16), None, None)
