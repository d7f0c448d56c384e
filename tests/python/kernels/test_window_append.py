"""Appending to the near buffer against plain indexing."""

from __future__ import annotations

import pytest
import torch
from icecache.kernels.window_append import _window_append, window_append, window_append_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def _case(dtype=torch.float32, d=80, e=64):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)  # noqa: E731
    # As models give them: heads and tokens transposed.
    keys, values = draw(2, 1, 3, d).transpose(1, 2), draw(2, 1, 3, e).transpose(1, 2)
    bounds = torch.tensor([[4, 4, 20], [4, 9, 7]], dtype=torch.int32).to(DEVICE)
    return keys, values, draw(2, 3, 24, d), draw(2, 3, 24, e), bounds


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_newest_column_gets_the_token_and_no_other_changes(dtype):
    keys, values, *near, bounds = _case(dtype)
    expected = [tensor.clone() for tensor in near]
    window_append_ref(keys, values, *expected, bounds)
    window_append(keys, values, *near, bounds)
    for ours, theirs in zip(near, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("stop", [0, -3, 25, 2**30])
def test_a_column_outside_of_the_buffer_is_not_written(stop):
    keys, values, *near, bounds = _case()
    before = [tensor.clone() for tensor in near]
    bounds[:, 2] = stop
    window_append(keys, values, *near, bounds)
    assert all(torch.equal(a, b) for a, b in zip(near, before, strict=True))


def test_a_wrong_argument_is_named():
    keys, values, near_keys, near_values, bounds = _case()
    with pytest.raises(ValueError, match=r"^keys:"):
        window_append(keys.half(), values, near_keys, near_values, bounds)
    with pytest.raises(ValueError, match=r"^near_values:"):
        window_append(keys, values, near_keys, near_values[:, :, :5], bounds)
    with pytest.raises(ValueError, match=r"^bounds:"):
        window_append(keys, values, near_keys, near_values, bounds.long())


def test_the_operator_and_its_fake_agree():
    torch.library.opcheck(_window_append, _case(), test_utils=("test_schema", "test_faketensor"))
