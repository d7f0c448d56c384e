"""Which core the model tests run on, and the sweep's list in the terminal summary."""

from __future__ import annotations

import threading

import pytest
import reference_core
import torch
from icecache import _core
from icecache.pages import ahead

CORE_NAMES = (
    "Pool",
    "PageStore",
    "Forest",
    "Selection",
    "extend",
    "search",
    "select_pages",
    "random_pages",
    "all_pages",
)


@pytest.fixture(autouse=True)
def quiet_torch():
    torch.set_num_threads(1)
    torch.manual_seed(0)


@pytest.fixture
def late(monkeypatch):
    """Inserts end only when a step, or the end of the runtime, waits for them; returns how often that was a step."""
    wanted, closing, waits = threading.Semaphore(0), threading.Event(), []
    insert, wait, close = ahead.insert, ahead._wait_for, ahead.Inserter.close

    def slow(*arguments):
        while not wanted.acquire(timeout=0.02) and not closing.is_set():
            pass
        insert(*arguments)

    def wait_for(job, *arguments):
        assert not job.done()
        waits.append(job)
        wanted.release()
        wait(job, *arguments)

    def close_at_last(inserter):
        closing.set()
        close(inserter)
        closing.clear()

    monkeypatch.setattr(ahead, "insert", slow)
    monkeypatch.setattr(ahead, "_wait_for", wait_for)
    monkeypatch.setattr(ahead.Inserter, "close", close_at_last)
    yield waits
    closing.set()


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
