"""The merge of partial results against float64."""

from __future__ import annotations

import pytest
import torch
from icecache.kernels.merge_splits import _merge_splits, merge_splits, merge_splits_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _case(splits=5, g=4, e=64):
    generator = torch.Generator().manual_seed(0)
    out = torch.randn(2, 3, splits, g, e, generator=generator)
    lse = 4 * torch.randn(2, 3, splits, g, generator=generator)
    return out.to(DEVICE), lse.to(DEVICE)


@pytest.mark.parametrize("splits", [1, 2, 31, 32, 33, 70])
@pytest.mark.parametrize(("g", "e"), [(1, 64), (7, 80)])
def test_merging_equals_the_weighted_sum(splits, g, e):
    case = _case(splits, g, e)
    for ours, exact in zip(merge_splits(*case, torch.float32), merge_splits_ref(*case), strict=True):
        torch.testing.assert_close(ours.double(), exact, atol=1e-5, rtol=1e-5)


def test_empty_splits_count_for_nothing():
    out, lse = _case(40)
    lse[:, :, :35] = float("-inf")
    expected = merge_splits_ref(out[:, :, 35:], lse[:, :, 35:])
    got = merge_splits(out, lse, torch.float32)
    torch.testing.assert_close(got[0].double(), expected[0], atol=1e-5, rtol=1e-5)
    lse.fill_(float("-inf"))
    got = merge_splits(out, lse, torch.float32)
    assert (got[0] == 0).all()
    assert (got[1] == float("-inf")).all()


def test_the_result_is_rounded_once():
    out, lse = _case()
    assert torch.equal(merge_splits(out, lse, torch.float16)[0], merge_splits(out, lse, torch.float32)[0].half())


def test_a_wrong_argument_is_named():
    out, lse = _case()
    with pytest.raises(ValueError, match=r"^out:"):
        merge_splits(out.half(), lse, torch.float32)
    with pytest.raises(ValueError, match=r"^lse:"):
        merge_splits(out, lse[:, :, :2], torch.float32)


def test_the_operator_and_its_fake_agree():
    arguments = (*_case(), torch.float16)
    torch.library.opcheck(_merge_splits, arguments, test_utils=("test_schema", "test_faketensor"))
