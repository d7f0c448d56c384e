"""The choice of candidates against a full sort."""

from __future__ import annotations

import pytest
import torch
from icecache.kernels.page_select import MAX_SLOTS, page_select, page_select_ref, select_scratch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK = 64


def select(logits, words, n_candidates, extents=None):
    """Candidates of each unit, and the log-sum-exps."""
    units, group, n = logits.shape
    extents = [n] * units if extents is None else extents
    padded = torch.nn.functional.pad(logits, (0, -n % BLOCK), value=float("-inf"))
    blocks = padded.view(units, group, -1, BLOCK)
    top = blocks.amax(-1)
    sums = (blocks - top.nan_to_num(neginf=0.0)[..., None]).exp().sum(-1)
    parts = torch.stack([top, sums], -1).transpose(1, 2).contiguous()
    ints = {"dtype": torch.int32, "device": DEVICE}
    chosen, counts = torch.full((units, n_candidates), -7, **ints), torch.full((units,), -7, **ints)
    lse = torch.full((units, group), torch.nan, device=DEVICE)
    at, on_device = torch.tensor(extents, **ints), (x.to(DEVICE) for x in (logits, parts, words.flatten()))
    scratch = torch.full((select_scratch(units, n, n_candidates),), -7, **ints)
    page_select(*on_device, at, scratch, chosen, counts, lse, slot_block=BLOCK)
    return [row[:k].tolist() for row, k in zip(chosen.cpu(), counts.tolist(), strict=True)], lse.cpu()


def some(units, group, n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(units, group, n, generator=generator)
    words = (torch.rand(units, n, generator=generator) < 0.8).long() * 3
    return logits.masked_fill((words == 0)[:, None], float("-inf")), words


@pytest.mark.parametrize(("group", "n", "k"), [(1, 100, 10), (4, 1100, 48), (3, 65, 48)])
def test_the_largest_weights_are_those_of_a_full_sort(group, n, k):
    logits, words = some(2, group, n)
    chosen, lse = select(logits, words, k)
    assert chosen == page_select_ref(logits.double(), words, k)
    assert torch.allclose(lse, torch.logsumexp(logits, -1), atol=1e-5)


def test_of_equal_weights_the_first_are_taken():
    logits, words = torch.zeros(1, 2, 90), torch.ones(1, 90, dtype=torch.int64)
    logits[0, :, [7, 70]] = 1.0
    chosen, _ = select(logits, words, 10)
    assert chosen == [[0, 1, 2, 3, 4, 5, 6, 7, 8, 70]]


def test_all_pages_are_candidates_when_they_are_few_even_without_weight():
    logits, words = some(1, 2, 60)
    logits[0, :, 5] = -1e4
    words[0, 5] = 1
    chosen, _ = select(logits, words, 64)
    assert chosen == [words[0].nonzero().flatten().tolist()]


def test_slots_behind_the_extent_are_not_looked_at():
    logits, words = some(2, 2, 128)
    logits[0, :, 64:] = 50.0
    chosen, lse = select(logits, words, 20, extents=[64, 0])
    assert max(chosen[0]) < 64
    assert chosen[1] == []
    assert lse[1].isneginf().all()


def test_one_head_that_knows_what_it_wants_is_heard_among_flat_ones():
    logits, words = torch.zeros(1, 4, 200), torch.ones(1, 200, dtype=torch.int64)
    logits[0, 2, 150] = 20.0
    chosen, _ = select(logits, words, 1)
    assert chosen == [[150]]


@pytest.mark.gpu
def test_sizes_of_long_contexts():
    for n in (2500, 19200, MAX_SLOTS):
        logits, words = some(2, 4, n, seed=n)
        chosen, _ = select(logits, words, 138)
        assert chosen == page_select_ref(logits.double(), words, 138)


def test_wrong_arguments_are_refused():
    logits, words = some(1, 2, 64)
    with pytest.raises(ValueError, match="words"):
        select(logits, words[:, :60], 5)
    too_many = torch.zeros(1, 1, MAX_SLOTS + 1, device="meta")
    with pytest.raises(ValueError, match="at most"):
        page_select(too_many, *[torch.zeros(1)] * 7, slot_block=BLOCK)
