"""Which core the model tests run on, and the sweep's list in the terminal summary."""

from __future__ import annotations

import pytest
import reference_core
import torch
from icecache import _core

CORE_NAMES = ("Pool", "PageStore", "Forest", "Selection", "extend", "search", "select_pages", "all_pages")
SWEEP: dict[str, list[str]] = {}
"""Outcome of the sweep: "identical", "dense", "refused", "not built" -> lines."""


def use_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace the compiled core by positional pages with exact scores."""
    for name in CORE_NAMES:
        monkeypatch.setattr(_core, name, getattr(reference_core, name), raising=False)


@pytest.fixture(autouse=True)
def quiet_torch():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def reference(monkeypatch):
    """Run a test on the reference core, whose every answer can be computed by hand."""
    use_reference(monkeypatch)


@pytest.fixture(autouse=True)
def core(monkeypatch):
    if not hasattr(_core, "Forest"):
        use_reference(monkeypatch)
