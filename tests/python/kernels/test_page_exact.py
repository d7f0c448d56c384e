"""Scores of candidates against float64."""

from __future__ import annotations

import pytest
import torch
from icecache.kernels.page_exact import FEW, page_best_ref, page_exact, page_exact_ref
from icecache.kernels.page_scan import page_scan_ref
from icecache.kernels.rotate_queries import rotate_queries
from paged_tools import DEVICE, make_slots

DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


def score(slots, q, chosen, counts, lse, scale, **options):
    """Scores (U, C, G), -7 where none is written."""
    units, group, dim = q.shape
    q = q.to(DEVICE)
    unit = torch.empty(1, units, group, dim, dtype=torch.float16, device=DEVICE)
    length = torch.empty(1, units, group, device=DEVICE)
    rotate_queries(q[None], slots.rotation, unit, length)
    exact = torch.full((units, chosen.shape[1], group), -7.0, device=DEVICE)
    ints = (x.to(torch.int32).to(DEVICE) for x in (chosen, counts))
    page_exact(q, unit, length, lse.float().to(DEVICE), slots.codes, *ints, exact, scale, **options)
    return exact.cpu()


def first_slots(slots, n):
    """Slots (U, n) of pages that are there, and how many of them are live."""
    chosen = torch.zeros(len(slots.words), n, dtype=torch.int64)
    counts = torch.zeros(len(slots.words), dtype=torch.int64)
    for unit, words in enumerate(slots.words):
        picks = words.nonzero().flatten()[: n - unit]
        chosen[unit, : len(picks)], counts[unit] = picks, len(picks)
    return chosen, counts


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("group", "dim", "softcap"), [(4, 64, None), (1, 128, None), (3, 24, 15.0)])
def test_few_candidates_are_scored_from_all_keys(group, dim, softcap, dtype):
    slots = make_slots(2, 12, dim, dtype)
    q = torch.randn(2, group, dim, generator=torch.Generator().manual_seed(2)).to(dtype)
    chosen, counts = first_slots(slots, 6)
    exact = score(slots, q, chosen, counts, torch.zeros(2, group), 0.3, softcap=softcap, best=1)
    keys = torch.where(slots.live[..., None], slots.keys, 0.0)
    expected = page_exact_ref(q, keys, slots.live, 0.3, softcap=softcap)
    # float64 sums of 16-bit products against float32 ones: the products themselves are exact in float32.
    for unit, n in enumerate(counts.tolist()):
        theirs = expected[unit, chosen[unit, :n]]
        assert (exact[unit, :n] - theirs).abs().max() <= 1e-5 * theirs.abs().max() + 1e-4
        assert (exact[unit, n:] == -7.0).all()


@pytest.mark.parametrize(("group", "dim", "softcap", "best"), [(4, 64, None, 4), (2, 24, 15.0, 1)])
def test_of_many_candidates_the_best_keys_are_read_and_the_others_estimated(group, dim, softcap, best):
    slots = make_slots(1, FEW + 12, dim, empty=0.0)
    q = 2 * torch.randn(1, group, dim, generator=torch.Generator().manual_seed(2))
    chosen, counts = first_slots(slots, FEW + 1)
    keys = torch.where(slots.live[..., None], slots.keys, 0.0)
    guessed = slots.decoded() @ slots.rotation.cpu().T
    zeros = torch.zeros_like(slots.distance)
    estimates = page_scan_ref(q, slots.rotation.cpu(), slots.decoded(), zeros, slots.words, 0.3, reach=0.0)
    lse = torch.logsumexp(estimates, -1)
    ours = score(slots, q, chosen, counts, lse, 0.3, softcap=softcap, best=best)[0]
    expected = page_best_ref(q, keys, guessed, slots.live, lse, 0.3, softcap=softcap, best=best)[0, chosen[0]]
    exact = page_exact_ref(q, keys, slots.live, 0.3, softcap=softcap)[0, chosen[0]]
    # Queries of the estimates are rounded to 11 bits; where two tokens are nearly alike, either may be read.
    errors = (ours - expected).abs() / expected.abs().max()
    assert errors.median() <= 1e-3
    assert errors.quantile(0.95) <= 5e-3
    guess = estimates[0].T[chosen[0]] if softcap is None else None
    if guess is not None:
        assert (ours - exact).abs().mean() < 0.5 * (guess - exact).abs().mean()


def test_a_query_that_is_not_a_number_shows():
    slots = make_slots(1, FEW + 12, 32, empty=0.0)
    chosen, counts = first_slots(slots, FEW + 1)
    scores = score(slots, torch.full((1, 1, 32), torch.nan), chosen, counts, torch.full((1, 1), torch.nan), 0.1, best=2)
    assert scores.isnan().all()


def test_wrong_arguments_are_refused():
    slots = make_slots(1, 12, 16)
    ints = {"dtype": torch.int32, "device": DEVICE}
    chosen, counts, exact = torch.zeros(1, 4, **ints), torch.zeros(1, **ints), torch.zeros(1, 4, 2, device=DEVICE)
    q, unit = torch.zeros(1, 2, 16, device=DEVICE), torch.zeros(1, 1, 2, 16, dtype=torch.float16, device=DEVICE)
    length, lse = torch.zeros(1, 1, 2, device=DEVICE), torch.zeros(1, 2, device=DEVICE)
    with pytest.raises(ValueError, match="chosen"):
        page_exact(q, unit, length, lse, slots.codes, chosen.long(), counts, exact, 1.0)
    with pytest.raises(ValueError, match="unit"):
        page_exact(q, unit.float(), length, lse, slots.codes, chosen, counts, exact, 1.0)
    with pytest.raises(ValueError, match="best"):
        page_exact(q, unit, length, lse, slots.codes, chosen, counts, exact, 1.0, best=17)
