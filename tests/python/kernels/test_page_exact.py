"""Exact scores of candidates against float64."""

from __future__ import annotations

import pytest
import torch
from icecache.kernels.page_exact import page_exact, page_exact_ref
from paged_tools import DEVICE, make_slots

DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("group", "dim", "softcap"), [(4, 64, None), (1, 128, None), (3, 24, 15.0)])
def test_scores_are_exact_and_only_of_candidates(group, dim, softcap, dtype):
    slots = make_slots(2, 12, dim, 1, dtype)
    q = torch.randn(2, group, dim, generator=torch.Generator().manual_seed(2)).to(dtype)
    chosen = torch.zeros(2, 8, dtype=torch.int32)
    counts = []
    for unit in range(2):
        picks = slots.words[unit].nonzero().flatten()[: 6 - unit]
        chosen[unit, : len(picks)] = picks
        counts.append(len(picks))
    exact = torch.full((2, 8, group), -7.0, device=DEVICE)
    counts_there = torch.tensor(counts, dtype=torch.int32, device=DEVICE)
    page_exact(q.to(DEVICE), slots.codes.words, chosen.to(DEVICE), counts_there, exact, 0.3, softcap=softcap)
    keys = torch.where(slots.live[..., None], slots.keys, 0.0)
    expected = page_exact_ref(q, keys, slots.live, 0.3, softcap=softcap)
    # float64 sums of 16-bit products against float32 ones: the products themselves are exact in float32.
    for unit, n in enumerate(counts):
        theirs = expected[unit, chosen[unit, :n].long()]
        assert (exact[unit, :n].cpu() - theirs).abs().max() <= 1e-5 * theirs.abs().max() + 1e-4
        assert (exact[unit, n:] == -7.0).all()


def test_wrong_arguments_are_refused():
    slots = make_slots(1, 12, 16, 1)
    ints = {"dtype": torch.int32, "device": DEVICE}
    chosen, counts, exact = torch.zeros(1, 4, **ints), torch.zeros(1, **ints), torch.zeros(1, 4, 2, device=DEVICE)
    q = torch.zeros(1, 2, 16, device=DEVICE)
    with pytest.raises(ValueError, match="chosen"):
        page_exact(q, slots.codes.words, chosen.long(), counts, exact, 1.0)
    with pytest.raises(ValueError, match="words"):
        page_exact(q, slots.codes.words.int(), chosen, counts, exact, 1.0)
