"""Attention over one part of the keys against float64, in the interpreter on a CPU and compiled on a GPU."""

from __future__ import annotations

import itertools

import pytest
import torch
from icecache.kernels.part_attention import _part_attention, part_attention, part_attention_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# bf16 tl.dot is wrong in the interpreter of triton 3.9 (it multiplies raw bit patterns), so bf16 needs a GPU.
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def draw(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def case(q=21, n=75, d=64, g=3, e=None, dtype=torch.float32):
    return draw(2, g, q, d, dtype=dtype), draw(2, n, d, dtype=dtype, seed=1), draw(2, n, e or d, dtype=dtype, seed=2)


def assert_accurate(got, arguments, scale, **options):
    """flash-attention's rule: at most twice the error of plain torch in our dtype, against float64."""
    exact = part_attention_ref(*arguments, scale, **options)
    plain = part_attention_ref(*arguments, scale, dtype=arguments[0].dtype, **options)
    for ours, theirs, truth in zip(got, plain, exact, strict=True):
        assert (ours == truth)[truth.isinf()].all()
        error = (theirs.double() - truth).nan_to_num(0.0).abs().max()
        assert (ours.double() - truth).nan_to_num(0.0).abs().max() <= 2 * error + 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("d", "g"), [(64, 1), (80, 3), (128, 2), (256, 1)])
def test_a_part_equals_attention_in_float64(d, g, causal, dtype):
    arguments = case(d=d, g=g, dtype=dtype)
    assert_accurate(part_attention(*arguments, d**-0.5, causal=causal), arguments, d**-0.5, causal=causal)


@pytest.mark.parametrize(("q", "n"), [(1, 1), (1, 32), (32, 32), (33, 31), (17, 49), (40, 20)])
@pytest.mark.parametrize("causal", [False, True])
def test_every_length_is_served(q, n, causal):
    arguments = case(q, n)
    got = part_attention(*arguments, 0.125, causal=causal, tile=(16, 32, 4, 1))
    assert_accurate(got, arguments, 0.125, causal=causal)


def test_parts_fold_into_the_whole():
    q, keys, values = case(20, 75)
    cuts = [0, 1, 30, 50]
    onto = None
    for first, stop in itertools.pairwise(cuts):
        onto = part_attention(q, keys[:, first:stop], values[:, first:stop], 0.125, onto=onto)
    got = part_attention(q, keys[:, 50:], values[:, 50:], 0.125, causal=True, onto=onto)
    assert_accurate(got, (q, keys, values), 0.125, causal=True)


def test_a_soft_cap_is_applied_to_the_scaled_logits():
    arguments = case()
    got = part_attention(*arguments, 0.5, softcap=3.0, causal=True)
    assert_accurate(got, arguments, 0.5, softcap=3.0, causal=True)


def test_queries_and_keys_may_be_views_and_values_of_another_width():
    q, keys, values = case(d=64, e=32)
    strided = [t.transpose(-2, -3).contiguous().transpose(-2, -3) for t in (q, keys, values)]
    assert not strided[0].is_contiguous()
    assert_accurate(part_attention(*strided, 0.125), (q, keys, values), 0.125)


def test_a_query_that_sees_no_key_keeps_what_it_has():
    arguments = case(q=20, n=5)
    onto = draw(2, 3, 20, 64, seed=5), draw(2, 3, 20, seed=6)
    before = onto[0].clone(), onto[1].clone()
    out, lse = part_attention(*arguments, 0.125, causal=True, onto=onto)
    assert torch.equal(out[:, :, :15], before[0][:, :, :15])
    torch.testing.assert_close(lse[:, :, :15], before[1][:, :, :15])
    assert not torch.equal(out[:, :, 15:], before[0][:, :, 15:])
    out, lse = part_attention(*arguments, 0.125, causal=True)
    assert (out[:, :, :15] == 0).all()
    assert (lse[:, :, :15] == float("-inf")).all()


def test_huge_logits_do_not_overflow():
    q, keys, values = case()
    out, lse = part_attention(q * 300, keys * 300, values, 1.0, causal=True)
    assert torch.isfinite(out).all()
    assert torch.isfinite(lse).all()


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda c: (c[0].transpose(2, 3), *c[1:]), "q"),
        (lambda c: (c[0].double(), *c[1:]), "q"),
        (lambda c: (c[0], c[1].half(), c[2]), "keys"),
        (lambda c: (c[0], c[1][:, :0], c[2][:, :0]), "keys"),
        (lambda c: (*c[:2], c[2][:, 1:]), "values"),
    ],
)
def test_a_wrong_argument_is_named(change, name):
    with pytest.raises(ValueError, match=f"^{name}:"):
        part_attention(*change(case()), 0.125)


def test_the_operator_and_its_fake_agree():
    q, keys, values = case()
    out, lse = draw(*q.shape), draw(*q.shape[:3])
    arguments = (q, keys, values, out, lse, 0.125, 0.0, True, True, [16, 32, 4, 1])
    torch.library.opcheck(_part_attention, arguments, test_utils=("test_schema", "test_faketensor"))
