"""What is kept of the candidates of a scan by signs, against float64."""

from __future__ import annotations

import pytest
import torch
from icecache.kernels.page_refine import page_refine, page_refine_ref
from icecache.kernels.page_scan import REACH, page_scan_ref
from icecache.kernels.rotate_queries import rotate_queries
from paged_tools import DEVICE, make_slots

SCALE = 0.2


def refine(slots, q, logits, candidates, n_kept, softcap=None):
    """Estimates (U, C, G) and the slots kept of each unit."""
    units, group, dim = q.shape
    q = q.to(DEVICE)
    unit = torch.empty(1, units, group, dim, dtype=torch.float16, device=DEVICE)
    length = torch.empty(1, units, group, device=DEVICE)
    rotate_queries(q[None], slots.rotation, unit, length)
    ints = {"dtype": torch.int32, "device": DEVICE}
    n = max(len(c) for c in candidates)
    chosen = torch.tensor([c + [0] * (n - len(c)) for c in candidates], **ints)
    counts = torch.tensor([len(c) for c in candidates], **ints)
    logits = logits.float()
    scores = torch.full((units, n, group), -7.0, device=DEVICE)
    kept, kept_counts = torch.full((units, n_kept), -7, **ints), torch.full((units,), -7, **ints)
    lse = torch.logsumexp(logits, -1)
    scan = (x.to(DEVICE) for x in (logits, lse))
    page_refine(unit, length, slots.codes, *scan, chosen, counts, scores, kept, kept_counts, SCALE, softcap=softcap)
    return scores.cpu(), [row[:k].tolist() for row, k in zip(kept.cpu(), kept_counts.tolist(), strict=True)]


def estimates(slots, q, softcap, *, fine):
    stored = slots.decoded(fine=fine), slots.distance, slots.words
    return page_scan_ref(q, slots.rotation.cpu(), *stored, SCALE, softcap=softcap, reach=REACH[fine])


@pytest.mark.parametrize(("group", "dim", "softcap"), [(4, 64, None), (1, 24, 12.0), (3, 128, None)])
def test_estimates_use_both_bits_and_the_best_are_kept(group, dim, softcap):
    slots = make_slots(2, 40, dim, seed=3)
    q = 2 * torch.randn(2, group, dim, generator=torch.Generator().manual_seed(2))
    by_signs, by_both = (estimates(slots, q, softcap, fine=fine) for fine in (False, True))
    candidates = [words.nonzero().flatten()[:n].tolist() for words, n in zip(slots.words, (20, 9), strict=True)]
    scores, kept = refine(slots, q, by_signs, candidates, 8, softcap)
    for unit, slots_of in enumerate(candidates):
        theirs = by_both[unit][:, slots_of].T
        error = (scores[unit, : len(slots_of)] - theirs).abs()
        assert error.max() <= 2e-3 * theirs.abs().max()  # queries are rounded to 11 bits
        assert (scores[unit, len(slots_of) :] == -7.0).all()
        by_both[unit][:, slots_of] = scores[unit, : len(slots_of)].T.double()  # no tie is decided by rounding
    assert kept == page_refine_ref(by_both, by_signs.float().double(), candidates, 8)


def test_few_candidates_are_all_kept():
    slots = make_slots(2, 20, 32)
    q = torch.randn(2, 2, 32, generator=torch.Generator().manual_seed(2))
    candidates = [slots.words[0].nonzero().flatten()[:7].tolist(), []]
    _, kept = refine(slots, q, estimates(slots, q, None, fine=False), candidates, 8)
    assert kept == candidates


def test_wrong_arguments_are_refused():
    slots = make_slots(1, 12, 16)
    ints = {"dtype": torch.int32, "device": DEVICE}
    unit, length = torch.zeros(1, 1, 2, 16, dtype=torch.float16, device=DEVICE), torch.zeros(1, 1, 2, device=DEVICE)
    logits, lse, scores = (torch.zeros(1, *shape, device=DEVICE) for shape in ((2, 12), (2,), (8, 2)))
    chosen, counts, kept = torch.zeros(1, 8, **ints), torch.zeros(1, **ints), torch.zeros(1, 4, **ints)
    with pytest.raises(ValueError, match="words"):
        page_refine(unit, length, slots.codes, logits[..., :11], lse, chosen, counts, scores, kept, counts, 1.0)
    with pytest.raises(ValueError, match="kept"):
        page_refine(unit, length, slots.codes, logits, lse, chosen, counts, scores, kept.long(), counts, 1.0)
