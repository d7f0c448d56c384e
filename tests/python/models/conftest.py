"""Which core the model tests run on, and the sweep's list in the terminal summary."""

from __future__ import annotations

import pytest
import reference_core
import torch
from icecache import _core

CORE_NAMES = ("Pool", "PageStore", "Forest", "Selection", "extend", "search", "select_pages", "all_pages")


@pytest.fixture(autouse=True)
def quiet_torch():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def reference(monkeypatch):
    """Run a test on the reference core: positional pages with exact scores, whose answers can be computed by hand."""
    for name in CORE_NAMES:
        monkeypatch.setattr(_core, name, getattr(reference_core, name))


def pytest_terminal_summary(terminalreporter):
    """Print the outcome of the sweep over decoder classes; under xdist too, where reports cross processes."""
    lines: dict[str, list[str]] = {}
    for report in (r for reports in terminalreporter.stats.values() for r in reports):
        for name, value in getattr(report, "user_properties", ()):
            if name == "sweep" and report.when == "call":
                kind, text = value
                model = report.nodeid.partition("[")[2].rstrip("]")
                lines.setdefault(kind, []).append(f"{model}: {text}"[:180])
    for kind in ("identical", "dense", "refused", "not built"):
        if kind in lines:
            terminalreporter.section(f"decoder classes, {kind}: {len(lines[kind])}")
            for line in sorted(lines[kind]):
                terminalreporter.write_line(line)
