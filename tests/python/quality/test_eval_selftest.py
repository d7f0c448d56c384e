"""`icecache eval selftest` passes, and does not once the search looks for the wrong pages."""

from __future__ import annotations

import pytest
from icecache.cli import main
from icecache.eval.selftest import selftest
from icecache.select import pages


def test_the_shipped_model_passes_its_gates(capsys):
    assert main(["eval", "selftest"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("ok ") for line in lines) == len(lines) - 1 == 7


def test_a_search_for_the_wrong_pages_fails_it(monkeypatch):
    search = pages._core.search

    def away_from_the_query(pool, forests, queries, *args, **kwargs):
        return search(pool, forests, -queries, *args, **kwargs)

    monkeypatch.setattr(pages._core, "search", away_from_the_query)
    lines = []
    assert selftest(lines.append, tasks=("kv32",), samples=4) == 1
    assert any(line.startswith("FAIL  icecache@128 loses") for line in lines)


def test_a_model_that_reads_too_much_fails_it(monkeypatch):
    # A selection that takes the whole context answers well, and must not pass for a small budget.
    search = pages._core.search

    def everything(pool, forests, queries, n_pages, **kwargs):
        return search(pool, forests, queries, 10_000, **kwargs)

    monkeypatch.setattr(pages._core, "search", everything)
    lines = []
    assert selftest(lines.append, tasks=("kv32",), samples=4) == 1
    assert any(line.startswith("FAIL  all attended to their budget") for line in lines)


@pytest.mark.parametrize("arguments", [["eval"], ["eval", "run"], ["eval", "compare"], ["eval", "nothing"]])
def test_a_command_line_that_lacks_something_is_refused(arguments, capsys):
    with pytest.raises(SystemExit) as exit_status:
        main(arguments)
    assert exit_status.value.code == 2
    assert "usage" in capsys.readouterr().err
