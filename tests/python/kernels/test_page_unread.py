"""Mean values of pages on the device, and the estimate made of them, against float64."""

from __future__ import annotations

import pytest
import torch
from icecache.kernels.page_unread import SLOT_BLOCK, page_unread, page_unread_ref
from icecache.kernels.page_values import PageValues, decoded_values, empty_values, page_values

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _pages(n, key_dim, dim, dtype, seed=0):
    """Memory of pages, its words, live slots (n, 16) and values (n, 16, dim); dead slots hold NaN."""
    generator = torch.Generator().manual_seed(seed)
    values = 1.0 + torch.randn(n, 16, dim, generator=generator)
    live = torch.rand(n, 16, generator=generator) < 0.7
    live[:, 3] = True
    values = torch.where(live[..., None], values, torch.nan).to(dtype)
    memory = torch.cat([torch.full((n, 16 * key_dim), torch.nan, dtype=dtype), values.flatten(1)], 1).to(DEVICE)
    address = memory.data_ptr() + torch.arange(n) * memory[0].numel() * memory.element_size()
    return memory, address | (live.long() << torch.arange(48, 64)).sum(1), live, values


@pytest.mark.parametrize(("key_dim", "dim"), [(64, 64), (16, 80), (128, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_slot_holds_the_mean_of_the_live_values_to_half_a_level(key_dim, dim, dtype):
    memory, words, live, rows = _pages(7, key_dim, dim, dtype)
    words[2] = 0  # a slot that loses its page keeps what it has: nobody reads it
    slots = torch.tensor([3, 8, 0, 5, 1, 7, 2])
    values = empty_values(9, dim, torch.device(DEVICE))
    page_values(values, slots.to(DEVICE), words.to(DEVICE), memory[:1, :1], key_dim=key_dim)
    mean = torch.where(live[..., None], rows.double(), 0.0).sum(1) / live.sum(1, keepdim=True)
    mean[2] = 0.0
    got = decoded_values(values).cpu()[slots]
    assert ((got - mean).abs() <= mean.abs().amax(1, keepdim=True) / 14 + 1e-5).all()
    assert not decoded_values(values)[[4, 6]].any()


def _estimate_case(group, dim, seed=0):
    generator = torch.Generator().manual_seed(seed)
    n = 2 * SLOT_BLOCK + 20
    logits = 3 * torch.randn(4, group, n, generator=generator)
    logits.transpose(1, 2)[torch.rand(4, n, generator=generator) < 0.1] = float("-inf")
    extents = torch.tensor([n, SLOT_BLOCK + 3, 5, 0], dtype=torch.int32)
    levels = torch.randint(0, 256, (4 * n, dim // 2), generator=generator, dtype=torch.uint8)
    values = PageValues(levels.to(DEVICE), (10 ** torch.randn(4 * n, generator=generator)).to(DEVICE))
    return logits, extents, values


@pytest.mark.parametrize("sharp", [1.0, 200.0])
@pytest.mark.parametrize(("group", "dim"), [(1, 64), (4, 128), (7, 80)])
def test_the_estimate_is_the_average_over_what_is_left(group, dim, sharp):
    logits, extents, values = _estimate_case(group, dim)
    out = page_unread((sharp * logits).to(DEVICE), extents.to(DEVICE), values, 2).cpu()
    means = decoded_values(values).cpu().view(4, -1, dim)
    expected = page_unread_ref(sharp * logits, extents, means).view(2, 2, group, dim)
    # Half precision weights: 2^-11 each, of values no larger than the largest.
    assert ((out - expected).abs() <= 2e-3 * means.abs().max()).all()
    assert ((out - expected).abs().mean() <= 2e-4 * means.abs().max()).all()
    assert not out[1, 1].any()


def test_bad_input_is_refused_by_name():
    logits, extents, values = _estimate_case(2, 64)
    with pytest.raises(ValueError, match=r"extents: .*int32"):
        page_unread(logits, extents.long(), values, 2)
    with pytest.raises(ValueError, match="n_rows: expected a divisor of 4 units, got 3"):
        page_unread(logits, extents, values, 3)
    with pytest.raises(ValueError, match="even number, got 7"):
        empty_values(3, 7, torch.device("cpu"))
