"""The choice among scored candidates against its definition."""

from __future__ import annotations

import pytest
import torch
from icecache.kernels.page_pick import page_pick, page_pick_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Case:
    """Random scores of 2 units with 90 slots, of which 20 and 9 are candidates."""

    def __init__(self, group, n_places, whole=(0, 0), seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.logits = 3 * torch.randn(2, group, 90, generator=generator)
        self.scores = self.logits.transpose(1, 2) + 0.5 * torch.randn(2, 90, group, generator=generator)
        self.candidates = [sorted(torch.randperm(90, generator=generator)[:n].tolist()) for n in (20, 9)]
        self.words = torch.arange(180).view(2, 90) + 1000
        self.whole, self.n_places = whole, n_places

    def pick(self, n_pages):
        """Pages taken, and the log-sum-exps."""
        group = self.logits.shape[1]
        chosen = torch.zeros(2, 20, dtype=torch.int32)
        exact = torch.full((2, 20, group), torch.nan)
        for unit, slots in enumerate(self.candidates):
            chosen[unit, : len(slots)] = torch.tensor(slots)
            exact[unit, : len(slots)] = self.scores[unit, slots]
        lse = torch.logsumexp(self.logits, -1)
        counts, whole = (torch.tensor(x, dtype=torch.int32) for x in ([len(c) for c in self.candidates], self.whole))
        left = self.logits.clone()
        inputs = (exact, left, lse, self.words.flatten(), chosen, counts, whole)
        table = torch.full((1, 2, self.n_places), -7, dtype=torch.int64, device=DEVICE)
        host_table = torch.full_like(table, -7)
        host_lse = torch.full((1, 2, group, 2), torch.nan, device=DEVICE)
        on_device = [x.to(DEVICE) for x in inputs]
        page_pick(*on_device, table, host_table, host_lse, n_pages=n_pages, leaves=True)
        self.left = on_device[1].cpu()
        assert torch.equal(table, host_table)
        rows = [[word for word in row.tolist() if word] for row in table[0]]
        for row, taken in zip(table[0].tolist(), rows, strict=True):
            assert row == taken + [0] * (self.n_places - len(taken))
        return [[word - 1000 - 90 * unit for word in row] for unit, row in enumerate(rows)], host_lse[0].cpu()


@pytest.mark.parametrize(("group", "n_pages"), [(4, 5), (1, 12), (3, 1)])
def test_pages_with_the_most_mass_are_taken(group, n_pages):
    case = Case(group, 2 * n_pages + 2)
    taken, lse = case.pick(n_pages)
    expected, sums = page_pick_ref(case.scores.double(), case.logits.double(), case.candidates, n_pages)
    assert taken == expected
    assert torch.allclose(lse.double(), sums, atol=1e-4)
    # What is left of the logits is, up to a factor of the head, what the totals leave to pages that are not taken.
    for unit, slots in enumerate(case.candidates):
        assert (case.left[unit][:, taken[unit]] == float("-inf")).all()
        others = sorted(set(slots) - set(taken[unit]))
        guess, known = (torch.logsumexp(x[unit].double()[:, slots], -1) for x in (case.logits, case.scores.mT))
        excess = (guess - known).clamp(min=0.0)
        assert torch.allclose(
            case.left[unit][:, others].double(), case.scores[unit, others].T + excess[:, None], atol=1e-4
        )
        untouched = [n for n in range(90) if n not in slots]
        assert torch.equal(case.left[unit][:, untouched], case.logits[unit][:, untouched])


def test_a_unit_that_is_read_whole_gives_all_its_pages():
    case = Case(2, 24, whole=(1, 1))
    taken, lse = case.pick(5)
    assert taken == case.candidates
    assert torch.allclose(lse[..., 0], lse[..., 1])


def test_a_unit_without_pages_has_an_empty_table():
    case = Case(2, 6)
    case.candidates[1] = []
    case.logits[1] = float("-inf")
    taken, lse = case.pick(3)
    assert taken[1] == []
    assert lse[1].isneginf().all()


def test_scores_that_are_not_numbers_show_in_the_sums():
    case = Case(2, 6)
    case.scores[0, case.candidates[0][3], 1] = torch.nan
    _, lse = case.pick(3)
    assert lse[0, 1, 0].isnan()
    assert lse[1].isfinite().all()


def test_wrong_arguments_are_refused():
    case = Case(2, 4)
    with pytest.raises(ValueError, match="n_pages"):
        case.pick(5)
