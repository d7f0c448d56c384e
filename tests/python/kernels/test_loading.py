"""What is compiled ahead of a step is what the step launches: the same kernels for the same kinds of arguments."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from icecache.attention import Loader, loading
from icecache.attention.finder import FinderShape
from launch_all import CASES, PAGES, decode_step, step_shape, wrapped_kernels


def kind(value):
    """What Triton compiles another kernel for."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if isinstance(value, int) and not isinstance(value, bool):
        return "int", value == 1, value % 16 == 0
    return "float" if isinstance(value, float) else value


def launches_of(work):
    """Kernels with the kinds of their arguments and their constants."""
    seen = set()

    def wrap(name, run):
        def noted(*args, grid, **options):
            constants = tuple(sorted((k, v) for k, v in options.items() if k != "warmup"))
            seen.add((name, tuple(map(kind, args)), constants))
            return run(*args, grid=grid, **options)

        return noted

    with wrapped_kernels(wrap):
        work()
    return seen


@pytest.mark.parametrize("bits", [1, pytest.param(2, marks=pytest.mark.gpu)])
def test_loading_a_step_launches_what_the_step_launches(bits):
    case = replace(CASES[0], bits=bits, slots=64)
    real = launches_of(lambda: decode_step(case))
    shape, finder = step_shape(case), FinderShape(case.slots, bits, PAGES)
    ahead = launches_of(lambda: loading.load_step(replace(shape, n_layers=7), finder, case.softcap))
    assert ahead >= real
    assert {name for name, _, _ in ahead} == {name for name, _, _ in real}
    assert len(real) >= 9


def test_of_layers_that_share_pages_two_groups_of_each_size_are_loaded(monkeypatch):
    shapes = []
    monkeypatch.setattr(loading, "DeviceStep", lambda shape, _box: shapes.append(shape) or Nothing())
    shape = replace(step_shape(CASES[0]), n_layers=11, shared=(3, 3, 3, 2), numbers=tuple(range(11)))
    loading.load_step(shape, None, None)
    assert (shapes[0].n_layers, shapes[0].shared, shapes[0].numbers) == (10, (2, 2, 3, 3), ())


class Nothing:
    """A step that attends to nothing."""

    def attend(self, *_args):
        return None


def test_a_loader_does_each_piece_once_and_keeps_errors_to_itself():
    done, loader, cpu = [], Loader(), torch.device("cpu")
    for key in ("a", "a", "b"):
        loader.start(key, cpu, lambda key=key: done.append(key))
        loader.finish()
    loader.start("c", cpu, lambda: 1 / 0)
    loader.finish()
    assert done == ["a", "b"]
