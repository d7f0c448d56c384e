"""The kernel that folds a part into earlier ones against float64, in the interpreter on a CPU and compiled on a GPU."""

from __future__ import annotations

import pytest
import torch
from icecache.kernels.fold_part import _fold_part, fold_part, fold_part_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NONE = float("-inf")


def case(dtype=torch.float32, q=19, e=64):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(DEVICE)  # noqa: E731
    part = draw(2, q, 3, e).to(dtype).transpose(1, 2)  # as libraries return it: not contiguous
    return part, draw(2, 3, q) * 9, draw(2, 3, q, e), draw(2, 3, q) * 9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("e", [64, 80])
def test_a_part_is_folded_by_its_log_sum_exp(dtype, e):
    arguments = case(dtype, e=e)
    expected = fold_part_ref(*arguments)
    fold_part(*arguments)
    torch.testing.assert_close(arguments[2].double(), expected[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(arguments[3].double(), expected[1], atol=1e-5, rtol=0)


def test_an_empty_side_leaves_the_other_one_as_it_is():
    part, part_lse, out, lse = case()
    part_lse[0], lse[1] = NONE, NONE
    part_lse[1, 2], out[1, 2] = NONE, 0.0
    before = out[0].clone()
    fold_part(part, part_lse, out, lse)
    assert torch.equal(out[0], before)
    assert torch.equal(out[1, :2], part[1, :2])
    assert (lse[1, 2] == NONE).all()
    assert (out[1, 2] == 0).all()


@pytest.mark.parametrize("name", ["part", "part_lse", "out", "lse"])
def test_a_wrong_argument_is_named(name):
    arguments = dict(zip(("part", "part_lse", "out", "lse"), case(), strict=True))
    arguments[name] = arguments[name].transpose(0, -1)
    with pytest.raises(ValueError, match=f"^{name}:"):
        fold_part(**arguments)


def test_the_operator_and_its_fake_agree():
    torch.library.opcheck(_fold_part, case(), test_utils=("test_schema", "test_faketensor"))
