"""All samples of a run, made and checked before the first step of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from icecache.errors import ConfigError, DataError
from icecache.eval.render import Prompt, prepare
from icecache.eval.suites import SUITES
from icecache.eval.task import DataDir, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Cell:
    """The samples of a task at a length.

    Parameters
    ----------
    task : Task
        Which.
    length : int or None
        None: as the data has it.
    prompts : tuple of Prompt
        At least one.
    """

    task: Task
    length: int | None
    prompts: tuple[Prompt, ...]

    @property
    def label(self) -> str:
        """For progress lines."""
        return self.task.name if self.length is None else f"{self.task.name} {self.length}"


def make_cells(
    tasks: Sequence[Task],
    lengths: tuple[int, ...],
    *,
    limit: int | None,
    seed: int,
    data: DataDir | None,
    tokenizer: PreTrainedTokenizerBase,
    model_limit: int | None,
    report: Callable[[str], None] = lambda _: None,
) -> list[Cell]:
    """Make and tokenise every sample.

    Parameters
    ----------
    tasks : sequence of Task
        In the order they will run.
    lengths : tuple of int
        Empty: each suite's own.
    limit : int or None
        Samples a cell; None: each suite's own number.
    seed : int
        Of the samples.
    data : DataDir or None
        Official files.
    tokenizer : PreTrainedTokenizerBase
        Of the model.
    model_limit : int or None
        Most positions of the model.
    report : callable, optional
        Called with each cell's label before its samples are made.

    Raises
    ------
    ConfigError
        If a sample is longer than the model's limit.
    DataError
        If a task's data is missing or malformed, or it gives no sample or two of one id.
    """
    if model_limit is not None and any(length > model_limit for length in lengths):
        msg = f"--lengths must be at most the model's {model_limit} positions, got {max(lengths)}"
        raise ConfigError(msg)
    cells = []
    for task in tasks:
        suite = SUITES[task.suite]
        for length in (lengths or suite.lengths) if suite.lengths else (None,):
            report(task.name if length is None else f"{task.name} {length}")
            samples = task.samples(tokenizer, length=length, n=limit or suite.samples, seed=seed, data=data)
            cell = Cell(task, length, tuple(prepare(sample, tokenizer) for sample in samples))
            _check_cell(cell, model_limit)
            cells.append(cell)
    return cells


def _check_cell(cell: Cell, model_limit: int | None) -> None:
    if not cell.prompts:
        msg = f"{cell.label}: no samples"
        raise DataError(msg)
    names = [prompt.sample.id for prompt in cell.prompts]
    if len(set(names)) != len(names):
        double = next(name for name in names if names.count(name) > 1)
        msg = f"{cell.label}: two samples have the id {double!r}"
        raise DataError(msg)
    longest = max(cell.prompts, key=lambda prompt: prompt.n_most)
    if model_limit is not None and longest.n_most > model_limit:
        msg = (
            f"{cell.label}: sample {longest.sample.id} comes to {longest.n_most} tokens with its answer, the model has "
            f"{model_limit} positions"
        )
        raise ConfigError(msg)


def batches(prompts: Sequence[Prompt], most: int) -> Iterator[list[Prompt]]:
    """Group prompts of one shape; a batch depends on the samples only, not on what is done already.

    Parameters
    ----------
    prompts : sequence of Prompt
        Of a cell.
    most : int
        Rows of a batch.
    """
    shapes: dict[tuple[int, int, int], list[Prompt]] = {}
    for prompt in prompts:
        shapes.setdefault((*prompt.shape, len(prompt.bare)), []).append(prompt)
    for same in shapes.values():
        for start in range(0, len(same), most):
            yield same[start : start + most]
