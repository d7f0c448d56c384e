"""Records of a run as paired scores: what the tables, the comparison and the plots are made from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Final

import numpy as np

from icecache.errors import ConfigError, DataError
from icecache.eval.folder import read_manifest, read_records
from icecache.eval.record import Manifest, Record, Setup
from icecache.eval.stats import Floats

DISCRIMINATES: Final = 0.10
"""A task says something about a budget if random pages lose at least so much of full attention's score."""
ORACLES: Final = ("token-oracle", "token-oracle-q", "page-oracle", "page-oracle-positional", "oracle-sampling")
"""Policies that read the true scores: bounds, not rivals."""
CONTROL_ORDER: Final = ("full", "exact", "full-eager", "no-context", "random", "streaming")


@dataclass(frozen=True, slots=True, order=True)
class Cell:
    """A task at a length in a setup: samples that are averaged together.

    Parameters
    ----------
    setup : {"A", "B"}
        Whether the question was prefilled densely.
    length : int
        Nominal tokens; 0: the data has its own lengths.
    task : str
        Name.
    """

    setup: Setup
    length: int
    task: str


@dataclass(frozen=True, slots=True)
class Pairs:
    """Scores of two arms on the same samples.

    Parameters
    ----------
    ids : tuple of str
        Samples, sorted.
    first, second : numpy.ndarray
        float64 `(N,)`.
    """

    ids: tuple[str, ...]
    first: Floats
    second: Floats


def arm_order(arm: str) -> tuple[int, str, int]:
    """Sort key: controls first, then policies by name, budgets ascending."""
    policy, _, budget = arm.partition("@")
    place = CONTROL_ORDER.index(policy) if policy in CONTROL_ORDER else len(CONTROL_ORDER)
    return place, policy, int(budget or 0)


def budget_of(arm: str) -> int | None:
    """Nominal budget of an arm; None: it has none."""
    budget = arm.partition("@")[2]
    return int(budget) if budget else None


class Results:
    """All records of a run.

    Parameters
    ----------
    records : iterable of Record
        At least one.
    manifest : Manifest or None, default=None
        How they were made.

    Attributes
    ----------
    cells : list of Cell
        In the order of setups, lengths and first appearance of tasks.
    arms : list of str
        Full attention first.

    Raises
    ------
    DataError
        If there is no record, or one sample has two prompts.
    """

    def __init__(self, records: Iterable[Record], manifest: Manifest | None = None) -> None:
        self.manifest = manifest
        self._records: dict[tuple[Cell, str], dict[str, Record]] = {}
        prompts: dict[tuple[str, str], str] = {}
        for record in records:
            prompt = prompts.setdefault((record.task, record.id), record.prompt_sha256)
            if prompt != record.prompt_sha256:
                msg = f"sample {record.task}/{record.id} stands for two different prompts"
                raise DataError(msg)
            cell = Cell(record.setup, record.length or 0, record.task)
            self._records.setdefault((cell, record.arm), {})[record.id] = record
        if not self._records:
            msg = "there are no records"
            raise DataError(msg)
        tasks = list(dict.fromkeys(cell.task for cell, _ in self._records))
        self.cells = sorted({c for c, _ in self._records}, key=lambda c: (c.setup, c.length, tasks.index(c.task)))
        self.arms = sorted({arm for _, arm in self._records}, key=arm_order)

    @classmethod
    def read(cls, folder: Path) -> Results:
        """Read a run's folder.

        Raises
        ------
        DataError
            If it is none, or holds no records.
        """
        return cls(read_records(folder), read_manifest(folder))

    @property
    def groups(self) -> list[tuple[Setup, int]]:
        """Setups and lengths that have cells."""
        return list(dict.fromkeys((cell.setup, cell.length) for cell in self.cells))

    @property
    def budgets(self) -> list[int]:
        """Nominal budgets, ascending."""
        return sorted({b for arm in self.arms if (b := budget_of(arm)) is not None})

    def of_group(self, setup: Setup, length: int) -> list[Cell]:
        """Cells of a setup and length."""
        return [cell for cell in self.cells if (cell.setup, cell.length) == (setup, length)]

    def records(self, cell: Cell, arm: str) -> Mapping[str, Record]:
        """Give the records by sample; empty: the arm did not run there."""
        return self._records.get((cell, arm), {})

    def score(self, cell: Cell, arm: str) -> float | None:
        """Mean score; None: the arm did not run there."""
        found = self.records(cell, arm)
        return fmean(record.score for record in found.values()) if found else None

    def pairs(self, cell: Cell, first: str, second: str) -> Pairs | None:
        """Scores of the samples that both arms have; None: there are none."""
        one, two = self.records(cell, first), self.records(cell, second)
        return pair_up(one, two)

    def discriminates(self, cell: Cell, budget: int | None) -> bool | None:
        """Whether the task tells a working policy from random pages; None: that control did not run."""
        full, chance = self.score(cell, "full"), self.score(cell, f"random@{budget}")
        return None if full is None or chance is None else full - chance >= DISCRIMINATES

    def averaged(self, setup: Setup, length: int, arms: Sequence[str]) -> list[Cell]:
        """Cells that count in the average of these arms: all ran there, none is known not to discriminate."""
        budgets = {b for arm in arms if (b := budget_of(arm)) is not None}
        return [
            cell
            for cell in self.of_group(setup, length)
            if all(self.records(cell, arm) for arm in arms)
            and not any(self.discriminates(cell, budget) is False for budget in budgets)
        ]

    def mean(self, cells: Sequence[Cell], arm: str, field: str) -> float | None:
        """Mean of a number of the accounting over all records; None: there are none that have it."""
        found = [
            float(value)
            for cell in cells
            for record in self.records(cell, arm).values()
            if (value := getattr(record.stats, field)) is not None
        ]
        return fmean(found) if found else None

    def check_arms(self, arms: Sequence[str]) -> None:
        """Refuse arms that did not run.

        Raises
        ------
        ConfigError
            Naming those there are.
        """
        unknown = [arm for arm in arms if arm not in self.arms]
        if unknown:
            msg = f"arms must be among {', '.join(self.arms)}, got {', '.join(unknown)}"
            raise ConfigError(msg)


def pair_up(one: Mapping[str, Record], two: Mapping[str, Record]) -> Pairs | None:
    """Pair the scores of the samples that both have; None: there are none.

    Raises
    ------
    DataError
        If a sample's prompts differ.
    """
    ids = tuple(sorted(one.keys() & two.keys()))
    for name in ids:
        if one[name].prompt_sha256 != two[name].prompt_sha256:
            msg = f"sample {one[name].task}/{name} has another prompt in the other run: other seed, data or template"
            raise DataError(msg)
    if not ids:
        return None
    scores = (np.array([arm[name].score for name in ids], dtype=np.float64) for arm in (one, two))
    return Pairs(ids, *scores)
