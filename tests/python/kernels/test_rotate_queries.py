"""Rotated unit queries against float64."""

from __future__ import annotations

import pytest
import torch
from icecache.kernels.page_codes import rotation_matrix
from icecache.kernels.rotate_queries import rotate_queries, rotate_queries_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("group", "dim"), [(1, 64), (4, 128), (5, 24)])
def test_queries_are_turned_and_of_length_one(group, dim, dtype):
    q = torch.randn(2, 3, group, dim, generator=torch.Generator().manual_seed(1)).to(dtype).to(DEVICE)
    q[1, 2, 0] = 0
    rotation = rotation_matrix(dim, torch.device(DEVICE))
    unit = torch.empty(2, 3, group, dim, dtype=torch.float16, device=DEVICE)
    length = torch.empty(2, 3, group, device=DEVICE)
    rotate_queries(q, rotation, unit, length)
    expected_unit, expected_length = rotate_queries_ref(q, rotation)
    assert (unit - expected_unit).abs().max() <= 2**-11
    assert torch.allclose(length.double(), expected_length, rtol=1e-5)


def test_the_rotation_keeps_products():
    rotation = rotation_matrix(64, torch.device("cpu")).double()
    assert torch.allclose(rotation @ rotation.T, torch.eye(64, dtype=torch.float64), atol=1e-6)


def test_wrong_arguments_are_refused():
    q, rotation = torch.zeros(1, 1, 2, 16, device=DEVICE), rotation_matrix(16, torch.device(DEVICE))
    unit, length = torch.zeros(1, 1, 2, 16, device=DEVICE), torch.zeros(1, 1, 2, device=DEVICE)
    with pytest.raises(ValueError, match="unit"):
        rotate_queries(q, rotation, unit, length)
    with pytest.raises(ValueError, match="rotation"):
        rotate_queries(q, rotation[:4], unit.half(), length)
