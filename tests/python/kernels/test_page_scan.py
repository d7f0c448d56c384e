"""Estimates of all pages against float64 sums over their decoded keys."""

from __future__ import annotations

import pytest
import torch
from icecache.kernels.page_codes import PageCodes
from icecache.kernels.page_scan import REACH, SLOT_BLOCK, n_parts, page_scan, page_scan_ref
from icecache.kernels.rotate_queries import rotate_queries
from paged_tools import DEVICE, make_slots


def scan(slots, q, extents, scale, softcap=None, *, fine=True):
    units, n, _, dim = slots.keys.shape
    group = q.shape[1]
    q = q.to(DEVICE)
    unit = torch.empty(1, units, group, dim, dtype=torch.float16, device=DEVICE)
    length = torch.empty(1, units, group, device=DEVICE)
    rotate_queries(q[None].contiguous(), slots.rotation, unit, length)
    logits = torch.full((units, group, n), torch.nan, device=DEVICE)
    parts = torch.full((units, n_parts(n), group, 2), torch.nan, device=DEVICE)
    extents = torch.tensor(extents, dtype=torch.int32, device=DEVICE)
    page_scan(unit, length, extents, slots.codes, logits, parts, scale, softcap=softcap, fine=fine)
    return logits.cpu(), parts.cpu()


def expected_of(slots, q, scale, softcap=None, *, fine):
    stored = slots.decoded(fine=fine), slots.distance, slots.words
    return page_scan_ref(q, slots.rotation.cpu(), *stored, scale, softcap=softcap, reach=REACH[fine])


@pytest.mark.parametrize(
    ("fine", "dim", "group", "softcap"),
    [
        (True, 24, 3, 20.0),
        (False, 32, 1, None),
        *(
            pytest.param(*x, marks=pytest.mark.gpu)
            for x in ((False, 128, 4, None), (True, 128, 4, None), (True, 256, 8, 30.0))
        ),
    ],
)
def test_estimates_are_those_of_the_decoded_keys(fine, dim, group, softcap):
    n = SLOT_BLOCK + 9  # the interpreter takes a second a block
    slots = make_slots(2, n, dim, seed=dim + group)
    q = 3 * torch.randn(2, group, dim, generator=torch.Generator().manual_seed(5))
    logits, parts = scan(slots, q, [n, n - 12], 0.1, softcap, fine=fine)
    expected = expected_of(slots, q, 0.1, softcap, fine=fine)
    expected[1, :, n - 12 :] = torch.nan  # behind the extent nothing is written
    assert torch.equal(logits.isnan(), expected.isnan())
    there = expected.isfinite()
    assert torch.equal(logits.isneginf(), expected.isneginf())
    # Queries are rounded to 11 bits: the error grows with the logits, of which there are many near 30.
    assert (logits[there] - expected[there]).abs().max() <= 2e-3 * expected[there].abs().max()
    for unit, extent in enumerate((n, n - 12)):
        blocks = torch.split(logits[unit, :, :extent].double(), SLOT_BLOCK, dim=1)
        for j, block in enumerate(blocks):
            lse = parts[unit, j, :, 0].double() + parts[unit, j, :, 1].double().log()
            assert torch.allclose(lse, torch.logsumexp(block, 1), atol=1e-4)
        assert parts[unit, len(blocks) :].isnan().all()


def test_two_bits_come_nearer_to_the_true_sums_than_one():
    q = 3 * torch.randn(1, 2, 64, generator=torch.Generator().manual_seed(5))
    errors = []
    slots = make_slots(1, 60, 64, empty=0.0)
    for fine in (False, True):
        logits, _ = scan(slots, q, [60], 0.1, fine=fine)
        true = (q.double() @ torch.where(slots.live[..., None], slots.keys, 0.0).double().flatten(0, 2).T) * 0.1
        true = true.view(1, 2, 60, 16).masked_fill(~slots.live[:, None], float("-inf"))
        errors.append((logits - torch.logsumexp(true, -1)).std())  # the room for rounding is nearly the same for all
    assert errors[1] < 0.8 * errors[0]  # not .57: means are rounded alike


def test_a_query_that_is_not_a_number_shows():
    slots = make_slots(1, 40, 32)
    logits, _ = scan(slots, torch.full((1, 1, 32), torch.nan), [40], 0.1)
    assert logits[0, 0, slots.words[0] != 0].isnan().all()


def test_a_unit_without_pages_is_left_alone():
    slots = make_slots(2, 10, 32)
    logits, parts = scan(slots, torch.ones(2, 1, 32), [0, 10], 0.1)
    assert logits[0].isnan().all()
    assert parts[0].isnan().all()
    assert not logits[1].isnan().any()


def test_wrong_arguments_are_refused():
    slots = make_slots(1, 10, 32)
    unit, length = torch.zeros(1, 2, 32, dtype=torch.float16, device=DEVICE), torch.zeros(1, 2, device=DEVICE)
    extents, parts = torch.zeros(1, dtype=torch.int32, device=DEVICE), torch.zeros(1, 1, 2, 2, device=DEVICE)
    codes = slots.codes
    with pytest.raises(ValueError, match="words"):
        page_scan(unit, length, extents, codes, torch.zeros(1, 2, 11, device=DEVICE), parts, 1.0)
    short = PageCodes(codes.words, codes.signs[:, :16], *codes.tensors()[2:])
    with pytest.raises(ValueError, match="unit"):
        page_scan(unit, length, extents, short, torch.zeros(1, 2, 10, device=DEVICE), parts, 1.0)
