"""The paged decode kernel against float64, in the interpreter on a CPU and compiled on a GPU."""

from __future__ import annotations

import pytest
import torch
from icecache.kernels.paged_decode import _paged_decode_splits, page_words, paged_decode, paged_decode_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# bf16 tl.dot is wrong in the interpreter of triton 3.9 (it multiplies raw bit patterns), so bf16 needs a GPU.
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
SINK, START, STOP, COLUMNS = 16, 21, 55, 80


def _case(g=4, d=64, k=5, dtype=torch.float32, b=2, h=2, seed=0):
    """Queries, near part and pages; row 1 has a shorter window and no sink."""
    generator = torch.Generator().manual_seed(seed)
    n_pages = 3 * k + 2
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)  # noqa: E731
    bounds = torch.tensor([[SINK, START, STOP], [0, 33, STOP]][:b], dtype=torch.int32).to(DEVICE)
    near = draw(b, h, COLUMNS, d), draw(b, h, COLUMNS, d), bounds
    table = torch.stack([torch.randperm(n_pages, generator=generator)[:k] for _ in range(b * h)]).view(b, h, k).int()
    counts = torch.randint(1, 17, (b, h, k), generator=generator, dtype=torch.int32)
    return draw(b, h, g, d), near, (draw(n_pages, 2, 16, d), table.to(DEVICE), counts.to(DEVICE))


def _run(case, scale, **options):
    q, near, paged = case
    return paged_decode(q, *near, page_words(*paged), scale, **options)


def _assert_accurate(got, case, scale, **options):
    """flash-attention's rule: at most twice the error of plain torch in our dtype, against float64."""
    exact = paged_decode_ref(*case, scale, **options)
    plain = paged_decode_ref(*case, scale, dtype=case[0].dtype, **options)
    for ours, theirs, truth in zip(got, plain, exact, strict=True):
        limit = 2 * (theirs.double() - truth).abs().max() + 1e-5
        assert (ours.double() - truth).abs().max() <= limit


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("g", [1, 4, 7, 8])
@pytest.mark.parametrize("d", [64, 80, 128, 256])
def test_the_kernel_equals_attention_over_near_tokens_and_pages(g, d, dtype):
    case = _case(g=g, d=d, k=3, dtype=dtype)
    _assert_accurate(_run(case, d**-0.5), case, d**-0.5)


@pytest.mark.parametrize("splits", [1, 2, 3, 8])
def test_splitting_the_page_list_changes_nothing(splits):
    case = _case(k=7)
    _assert_accurate(_run(case, 0.125, page_splits=splits), case, 0.125)


def test_a_long_near_part_is_split_and_merged():
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 2, n, 64, generator=generator).to(DEVICE) for n in (4, 700, 700))
    bounds = torch.tensor([[5, 6, 699], [0, 600, 601]], dtype=torch.int32).to(DEVICE)
    pages, table = torch.zeros(1, 2, 16, 64, device=DEVICE), torch.zeros(2, 2, 0, dtype=torch.int64, device=DEVICE)
    case = q, (k, v, bounds), (pages, table, table)
    _assert_accurate(_run(case, 0.125), case, 0.125)


def test_a_soft_cap_is_applied_to_the_scaled_logits():
    case = _case()
    _assert_accurate(_run(case, 0.5, softcap=3.0), case, 0.5, softcap=3.0)


@pytest.mark.parametrize("k", [0, 3])
def test_an_estimate_of_unread_pages_counts_as_one_more_token(k):
    case = _case(k=k)
    generator = torch.Generator().manual_seed(1)
    total = 3 + torch.randn(2, 2, 4, generator=generator)
    pair = torch.stack([total, total - torch.rand(2, 2, 4, generator=generator)], -1)
    pair[0, 0, 0] = 2.5  # nothing is left
    pair[0, 0, 1] = torch.tensor([1.0, 1.0 + 1e-6])  # less than nothing, by rounding
    pair[1, 1, 3] = float("-inf")  # there are no pages
    pair[1, 0, 2, 1] = float("-inf")  # no page was read
    unread = pair.to(DEVICE), torch.randn(2, 2, 4, 64, generator=generator).to(DEVICE)
    _assert_accurate(_run(case, 0.125, unread=unread), case, 0.125, unread=unread)
    plain, some = _run(case, 0.125), _run(case, 0.125, unread=unread)
    for head in ((0, 0, 0), (0, 0, 1), (1, 1, 3)):
        torch.testing.assert_close(some[0][head], plain[0][head], atol=1e-6, rtol=0)
    with pytest.raises(ValueError, match="unread out"):
        _run(case, 0.125, unread=(unread[0], unread[1][..., :32]))


def test_without_pages_the_near_tokens_are_attended():
    case = _case(k=0)
    _assert_accurate(_run(case, 0.125), case, 0.125)


def test_pages_marked_absent_are_not_read():
    q, near, (pages, table, counts) = _case()
    table[:, :, 2] = -1
    kept = [0, 1, 3, 4]
    expected = paged_decode_ref(q, near, (pages, table[:, :, kept], counts[:, :, kept]), 0.125)
    out, lse = _run((q, near, (pages, table, counts)), 0.125)
    torch.testing.assert_close(out.double(), expected[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(lse.double(), expected[1], atol=1e-5, rtol=0)


def test_live_slots_may_have_gaps():
    q, near, (pages, table, counts) = _case()
    counts.fill_(16)
    words = page_words(pages, table, counts)
    gone = 5
    words &= ~(1 << (48 + gone))
    rest = [s for s in range(16) if s != gone]
    moved = torch.cat([pages[:, :, rest], pages[:, :, [gone]]], 2)
    expected = paged_decode_ref(q, near, (moved, table, counts - 1), 0.125)
    out, _ = paged_decode(q, *near, words, 0.125)
    torch.testing.assert_close(out.double(), expected[0], atol=1e-5, rtol=0)


def test_keys_and_values_of_a_page_may_lie_anywhere_in_its_rows():
    """Rows of a page as ``[V0 | K1 | V1]``: what a layer reads that shares the page choice of another one."""
    q, near, (pages, table, counts) = _case(d=64)
    n_pages, d = pages.shape[0], 64
    wide = torch.full((n_pages, 16 * d + 16 * 3 * d), float("nan"), device=DEVICE)
    rows = wide[:, 16 * d :].view(n_pages, 16, 3 * d)
    rows[:, :, d : 2 * d], rows[:, :, 2 * d :] = pages[:, 0], pages[:, 1]
    address = wide.data_ptr() + table.long() * wide[0].numel() * 4
    words = (((1 << counts.long()) - 1) << 48) | address
    expected = paged_decode_ref(q, near, (pages, table, counts), 0.125)
    strides = (16 * d + d, 3 * d, 16 * d + 2 * d, 3 * d)
    out, _ = paged_decode(q, *near, words, 0.125, page_strides=strides)
    torch.testing.assert_close(out.double(), expected[0], atol=1e-5, rtol=0)


def test_values_may_have_another_width_than_keys():
    q, (near_keys, near_values, bounds), (_, table, _) = _case(d=64, k=0)
    case = (q, (near_keys, near_values[..., :32], bounds))
    out, _ = paged_decode(q, *case[1], torch.zeros(2, 2, 0, dtype=torch.int64, device=DEVICE), 0.125)
    whole, _ = paged_decode(q, near_keys, near_values, bounds, torch.zeros_like(table, dtype=torch.int64), 0.125)
    torch.testing.assert_close(out, whole[..., :32])


def test_dead_slots_holding_infinities_do_not_leak_into_the_output():
    q, (near_keys, near_values, bounds), (pages, table, counts) = _case()
    counts.fill_(3)
    pages[:, :, 3:] = float("inf")
    near_keys[:, :, STOP:] = near_values[:, :, STOP:] = float("nan")
    out, lse = _run((q, (near_keys, near_values, bounds), (pages, table, counts)), 0.125)
    assert torch.isfinite(out).all()
    assert torch.isfinite(lse).all()


def test_a_head_without_live_tokens_gets_zero_and_minus_infinity():
    q, (near_keys, near_values, bounds), (pages, table, counts) = _case()
    bounds[0] = torch.tensor([0, 10, 10])
    table[0, 1] = -1
    out, lse = _run((q, (near_keys, near_values, bounds), (pages, table, counts)), 0.125, page_splits=2)
    assert (out[0, 1] == 0).all()
    assert (lse[0, 1] == float("-inf")).all()
    assert torch.isfinite(lse[1]).all()


def test_huge_logits_do_not_overflow():
    q, near, (pages, table, counts) = _case()
    out, lse = _run((q * 300, near, (pages * 30, table, counts)), 1.0)
    assert torch.isfinite(out).all()
    assert torch.isfinite(lse).all()


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda c: (c[0].transpose(1, 2), *c[1:]), "q"),
        (lambda c: (c[0].double(), *c[1:]), "q"),
        (lambda c: (c[0], c[1].half(), *c[2:]), "near_keys"),
        (lambda c: (*c[:2], c[2][:, :, :5], *c[3:]), "near_values"),
        (lambda c: (*c[:3], c[3].long(), c[4]), "bounds"),
        (lambda c: (*c[:4], c[4].int()), "table"),
    ],
)
def test_a_wrong_argument_is_named(change, name):
    q, near, paged = _case()
    with pytest.raises(ValueError, match=f"^{name}:"):
        paged_decode(*change((q, *near, page_words(*paged))), 0.125)


def test_the_operator_and_its_fake_agree():
    q, near, paged = _case()
    unread = torch.zeros(2, 2, 4, 2, device=DEVICE), torch.zeros(2, 2, 4, 64, device=DEVICE)
    for estimate in ((None, None), unread):
        arguments = (q, *near, page_words(*paged), 0.125, 0.0, [0, 64, 1024, 64], 2, 5, 2, *estimate)
        torch.library.opcheck(_paged_decode_splits, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_pinned_host_pages_give_the_result_of_device_pages(dtype):
    q, near, (pages, table, counts) = _case(g=4, d=128, k=13, dtype=dtype)
    on_host = pages.cpu().pin_memory()
    from_device = _run((q, near, (pages, table, counts)), 0.1)
    from_host = paged_decode(q, *near, page_words(on_host, table, counts), 0.1)
    assert torch.equal(from_device[0], from_host[0])
    assert torch.equal(from_device[1], from_host[1])


@pytest.mark.gpu
def test_a_captured_launch_reads_the_bounds_and_pages_of_the_day():
    q, (near_keys, near_values, bounds), (pages, table, counts) = _case(dtype=torch.bfloat16, d=128)
    words = page_words(pages, table, counts)
    run = lambda: paged_decode(q, near_keys, near_values, bounds, words, 0.1)  # noqa: E731
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = run()
    bounds[:, 2] += 1
    words.copy_(page_words(pages, table.flip(2).contiguous(), counts))
    expected, _ = run()
    graph.replay()
    assert torch.equal(out, expected)
