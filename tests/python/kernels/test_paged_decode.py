"""The paged decode kernel against float64, in the interpreter on a CPU and compiled on a GPU."""

from __future__ import annotations

import pytest
import torch
from icecache.kernels.paged_decode import merge_splits, paged_decode, paged_decode_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# bf16 tl.dot is wrong in the interpreter of triton 3.9 (it multiplies raw bit patterns), so bf16 needs a GPU.
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def _case(g=4, d=64, k=5, dtype=torch.float32, b=2, h=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    n_pages = 3 * k + 2
    q = torch.randn(b, h, g, d, generator=generator).to(dtype)
    pages = torch.randn(n_pages, 2, 16, d, generator=generator).to(dtype)
    table = torch.stack([torch.randperm(n_pages, generator=generator)[:k] for _ in range(b * h)]).view(b, h, k).int()
    counts = torch.randint(1, 17, (b, h, k), generator=generator, dtype=torch.int32)
    return [x.to(DEVICE) for x in (q, pages, table, counts)]


def _assert_accurate(got, case, scale):
    """flash-attention's rule: at most twice the error of plain torch in our dtype, against float64."""
    out, lse = got
    exact_out, exact_lse = paged_decode_ref(*case, scale)
    plain_out, plain_lse = paged_decode_ref(*case, scale, dtype=case[0].dtype)
    for ours, plain, exact in ((out, plain_out, exact_out), (lse, plain_lse, exact_lse)):
        limit = 2 * (plain.double() - exact).abs().max() + 1e-5
        assert (ours.double() - exact).abs().max() <= limit


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("g", [1, 4, 7, 8])
@pytest.mark.parametrize("d", [64, 80, 128, 256])
def test_the_kernel_equals_attention_over_the_selected_pages(g, d, dtype):
    case = _case(g=g, d=d, dtype=dtype)
    _assert_accurate(paged_decode(*case, d**-0.5), case, d**-0.5)


@pytest.mark.parametrize("splits", [2, 3, 8])
def test_splitting_the_page_list_changes_nothing(splits):
    case = _case(k=7)
    _assert_accurate(paged_decode(*case, 0.125, splits=splits), case, 0.125)


def test_pages_marked_absent_are_not_read():
    q, pages, table, counts = _case()
    table[:, :, 2] = -1
    counts[:, :, 2] = 16
    kept = [0, 1, 3, 4]
    expected = paged_decode_ref(q, pages, table[:, :, kept].contiguous(), counts[:, :, kept].contiguous(), 0.125)
    out, lse = paged_decode(q, pages, table, counts, 0.125)
    torch.testing.assert_close(out.double(), expected[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(lse.double(), expected[1], atol=1e-5, rtol=0)


def test_dead_slots_holding_infinities_do_not_leak_into_the_output():
    q, pages, table, counts = _case()
    counts.fill_(3)
    pages[:, :, 3:] = float("inf")
    out, lse = paged_decode(q, pages, table, counts, 0.125)
    assert torch.isfinite(out).all()
    assert torch.isfinite(lse).all()


def test_a_head_without_live_tokens_gets_zero_and_minus_infinity():
    q, pages, table, counts = _case()
    table[0, 1] = -1
    out, lse = paged_decode(q, pages, table, counts, 0.125, splits=2)
    assert (out[0, 1] == 0).all()
    assert (lse[0, 1] == float("-inf")).all()
    assert torch.isfinite(lse[1]).all()


def test_huge_logits_do_not_overflow():
    q, pages, table, counts = _case()
    out, lse = paged_decode(q * 300, pages * 30, table, counts, 1.0)
    assert torch.isfinite(out).all()
    assert torch.isfinite(lse).all()


def test_merging_equals_attending_at_once():
    case = _case(k=6)
    halves = [
        paged_decode_ref(case[0], case[1], *(x[:, :, s].contiguous() for x in case[2:]), 0.125)
        for s in (slice(0, 3), slice(3, 6))
    ]
    merged = merge_splits(torch.stack([o for o, _ in halves], 2), torch.stack([x for _, x in halves], 2))
    whole = paged_decode_ref(*case, 0.125)
    torch.testing.assert_close(merged[0], whole[0])
    torch.testing.assert_close(merged[1], whole[1])


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda c: (c[0].transpose(1, 2), *c[1:]), "q"),
        (lambda c: (c[0], c[1].half(), *c[2:]), "q and pages"),
        (lambda c: (c[0], c[1][:, :1].contiguous(), *c[2:]), "pages"),
        (lambda c: (c[0], c[1], c[2].long(), c[3]), "table"),
        (lambda c: (*c[:3], c[3][:, :, :2].contiguous()), "counts"),
    ],
)
def test_a_wrong_argument_is_named(change, name):
    with pytest.raises(ValueError, match=f"^{name}:"):
        paged_decode(*change(_case()), 0.125)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_pinned_host_pages_give_the_result_of_device_pages(dtype):
    q, pages, table, counts = _case(g=4, d=128, k=13, dtype=dtype)
    on_host = pages.cpu().pin_memory()
    from_device, from_host = paged_decode(q, pages, table, counts, 0.1), paged_decode(q, on_host, table, counts, 0.1)
    assert torch.equal(from_device[0], from_host[0])
    assert torch.equal(from_device[1], from_host[1])
