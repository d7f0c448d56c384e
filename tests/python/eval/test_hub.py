"""Where the hub cannot give a data set, the message says which one, why, and what else can be done."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
from icecache.errors import DataError
from icecache.eval.data.hub import load_hub


def test_without_datasets_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"reading org/set from the hub needs .*icecache\[eval\].*; use --data-dir"):
        load_hub("org/set", None, "test", hint="use --data-dir")


def test_whatever_the_hub_raises_becomes_one_line_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, config: str | None, *, split: str) -> None:
        raise ConnectionError(f"{name}, {config}, {split}: offline")

    fake = ModuleType("datasets")
    fake.load_dataset = refuse  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    with pytest.raises(
        DataError, match=r"cannot read org/set .*ConnectionError: org/set, main, test.*; use --data-dir"
    ):
        load_hub("org/set", "main", "test", hint="use --data-dir")
