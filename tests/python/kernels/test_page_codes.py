"""Summaries of pages against their definition in float64."""

from __future__ import annotations

import pytest
import torch
from icecache.kernels.page_codes import decoded, empty_codes, page_codes, page_codes_ref, rotation_matrix, slot_bytes
from paged_tools import DEVICE, make_slots

DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def reference(slots):
    units, n, _, dim = slots.keys.shape
    codes = empty_codes(units * n, dim, torch.device("cpu"))
    everything = torch.arange(units * n)
    page_codes_ref(codes, everything, slots.words.flatten(), slots.rotation.cpu(), slots.keys.flatten(0, 1))
    return codes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 24])
def test_summaries_are_those_of_the_definition(dim, dtype):
    slots = make_slots(2, 9, dim, dtype)
    expected = reference(slots)
    there = (slots.words != 0).flatten()
    assert torch.equal(slots.codes.words.cpu() != 0, there)
    # A value on the edge of two levels may fall to either side: hardly any bit may differ.
    for name in ("signs", "fine", "means"):
        ours, theirs = (getattr(x, name).cpu()[there].long() for x in (slots.codes, expected))
        differing = sum(((ours ^ theirs) >> bit & 1).sum() for bit in range(16))
        assert differing <= 1e-4 * 16 * ours.numel() + 1, name
    scale, _step, distance = slots.codes.numbers.cpu()[:, there]
    assert torch.allclose(scale, expected.numbers[0, there], rtol=1e-5)
    assert torch.allclose(distance, expected.numbers[2, there], rtol=1e-3)


@pytest.mark.parametrize(("fine", "bound"), [(False, 0.64), (True, 0.37)])
def test_decoded_keys_lie_as_near_as_the_bits_allow(fine, bound):
    """One bit of a normal variable leaves .60 of its deviation, two bits leave .34."""
    slots = make_slots(2, 20, 64)
    rotated = torch.where(slots.live[..., None], slots.keys, 0.0) @ slots.rotation.cpu()
    mean = rotated.sum(2, keepdim=True) / slots.live.sum(2).clamp(min=1)[..., None, None]
    error, spread = ((rotated - x).norm(dim=-1)[slots.live] for x in (slots.decoded(fine=fine), mean))
    assert error.square().mean().sqrt() <= bound * spread.square().mean().sqrt()
    farthest = torch.where(slots.live, (rotated - slots.decoded()).norm(dim=-1), 0.0).amax(2)
    there = slots.words != 0
    assert torch.allclose(slots.distance[there], farthest[there], rtol=1e-3)


def test_a_slot_can_be_emptied_and_filled_again():
    slots = make_slots(1, 6, 32, empty=0.0)
    words, like = slots.codes.words.clone(), torch.zeros(1, device=DEVICE)
    before = slots.decoded()
    page_codes(slots.codes, torch.tensor([4], device=DEVICE), torch.zeros_like(words[:1]), slots.rotation, like)
    assert slots.codes.words.nonzero().flatten().tolist() == [0, 1, 2, 3, 5]
    page_codes(slots.codes, torch.tensor([4], device=DEVICE), words[3:4].clone(), slots.rotation, like)
    assert torch.equal(slots.decoded()[0, 4], before[0, 3])
    assert torch.equal(slots.decoded()[0, [0, 1, 2, 3, 5]], before[0, [0, 1, 2, 3, 5]])


def test_degenerate_pages_are_finite():
    """Zeros, one token, all equal, huge and tiny numbers."""
    keys = torch.zeros(5, 2, 16, 16)
    keys[1, 0, 0], keys[2, 0], keys[3, 0], keys[4, 0] = 1.5, 3.0, 1e18 * torch.randn(16, 16), 1e-30
    keys = keys.to(DEVICE)
    address = keys.data_ptr() + torch.arange(5) * keys[0].numel() * 4
    words = (address | torch.tensor([-1, 1, -1, -1, -1]) << 48).to(DEVICE)
    codes, rotation = empty_codes(5, 16, torch.device(DEVICE)), rotation_matrix(16, torch.device(DEVICE))
    page_codes(codes, torch.arange(5, device=DEVICE), words, rotation, torch.zeros(1, device=DEVICE))
    found = decoded(codes, torch.arange(5, device=DEVICE))
    assert found.isfinite().all()
    assert codes.numbers.isfinite().all()
    assert found[0].abs().max() == 0.0
    assert ((found[2] - keys[2, 0] @ rotation).norm(dim=-1) <= 0.1 * keys[2, 0].norm(dim=-1)).all()


def test_a_slot_takes_the_bytes_that_are_promised():
    for dim in (128, 64):
        codes = empty_codes(10, dim, torch.device("cpu"))
        assert codes.nbytes() == 10 * slot_bytes(2, dim)
        assert codes.nbytes() - codes.fine.nbytes == 10 * slot_bytes(1, dim)
    assert slot_bytes(1, 128) < 0.044 * 2 * 16 * 128 * 2, "signs: room for growth below 5 % of 16-bit keys and values"


def test_wrong_arguments_are_refused():
    codes, rotation = empty_codes(4, 16, torch.device(DEVICE)), rotation_matrix(16, torch.device(DEVICE))
    slots, like = torch.zeros(1, dtype=torch.int64, device=DEVICE), torch.zeros(1, device=DEVICE)
    with pytest.raises(ValueError, match="words"):
        page_codes(codes, slots, slots.int(), rotation, like)
    with pytest.raises(ValueError, match="rotation"):
        page_codes(codes, slots, slots, rotation[:8], like)
    with pytest.raises(ValueError, match="dim"):
        empty_codes(4, 15, torch.device("cpu"))
    with pytest.raises(ValueError, match="fine"):
        empty_codes(4, 16, torch.device("cpu"), torch.zeros(4, 8, dtype=torch.int16))
