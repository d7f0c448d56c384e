"""Samples: rows of a task cut into context, question and answer."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Final

import torch

from icecache.eval.needle.draw import Draw
from icecache.eval.needle.haystack import Haystack, Rows
from icecache.eval.needle.records import Request
from icecache.eval.needle.tasks import TASKS

# Rows shorter than this cannot hold every task's records beside some filler.
SHORTEST_SAMPLE: Final = 256
SHORTEST_STREAM: Final = 1 << 16


@dataclass(frozen=True, slots=True)
class Sample:
    """One question about one context.

    Parameters
    ----------
    task : str
        Key of `TASKS`.
    context : tuple of int
        Token ids of `<bos>`, filler and needles.
    question : tuple of int
        Token ids of the question, up to where the answer begins.
    answer : tuple of int
        Token ids the model should go on with.
    given : tuple of bool
        For each answer token: True when it is text that is fed (a forced segment), False when the model
        produces it.
    evidence : tuple of (int, int)
        Spans `[start, stop)` of the context that answer the question, ascending.
    seed, row : int
        The sample is row `row` of the batch drawn from `seed`.
    """

    task: str
    context: tuple[int, ...]
    question: tuple[int, ...]
    answer: tuple[int, ...]
    given: tuple[bool, ...]
    evidence: tuple[tuple[int, int], ...]
    seed: int
    row: int

    @property
    def prompt(self) -> tuple[int, ...]:
        """Context and question."""
        return self.context + self.question

    @property
    def shape(self) -> tuple[int, int, tuple[bool, ...]]:
        """What samples must share to run in one batch: lengths of context and question, and `given`."""
        return len(self.context), len(self.question), self.given

    def segments(self) -> list[tuple[bool, int, int]]:
        """Split the answer where it changes between given and produced tokens.

        Returns
        -------
        list of (bool, int, int)
            `(given, start, stop)` of each stretch, in order; together they cover the answer.
        """
        cuts = [i for i in range(1, len(self.given)) if self.given[i] != self.given[i - 1]]
        edges = [0, *cuts, len(self.given)]
        return [(self.given[start], start, stop) for start, stop in itertools.pairwise(edges)]


def make_rows(task: str, n_tokens: int, rows: int, seed: int, device: torch.device | str = "cpu") -> Rows:
    """Draw a batch of a task in its evaluation form.

    Parameters
    ----------
    task : str
        Key of `TASKS`.
    n_tokens : int
        Tokens of each row, question and answer included; at least 256.
    rows : int
        Rows of the batch.
    seed : int
        Source of randomness.
    device : torch.device or str, default="cpu"
        Where to draw; CPU and CUDA give different rows for one seed.

    Returns
    -------
    Rows
        One question a row, at its end.

    Raises
    ------
    ValueError
        If the task is unknown or a row too short.
    """
    if task not in TASKS:
        msg = f"task must be one of {', '.join(TASKS)}, got {task!r}"
        raise ValueError(msg)
    if n_tokens < SHORTEST_SAMPLE:
        msg = f"n_tokens must be at least {SHORTEST_SAMPLE}, got {n_tokens}"
        raise ValueError(msg)
    draw = Draw(device, seed)
    haystack = Haystack(draw, max(SHORTEST_STREAM, 4 * n_tokens))
    records = TASKS[task].build(draw, Request(rows, n_tokens, evaluation=True))
    return haystack.assemble(records, n_tokens, TASKS[task].filler)


def cut_row(task: str, batch: Rows, row: int, seed: int) -> Sample:
    """Cut one row of an evaluation batch into context, question and answer.

    Parameters
    ----------
    task : str
        Key of `TASKS`, stored in the sample.
    batch : Rows
        From `make_rows`.
    row : int
        Which row.
    seed : int
        Stored in the sample.

    Returns
    -------
    Sample
        The row as a sample.
    """
    tokens = tuple(batch.tokens[row].tolist())
    produced = batch.queries[row].gt(0).tolist()
    answer_start = produced.index(True)
    relevant = batch.relevant[row].tolist()
    edges = [i for i in range(1, len(relevant)) if relevant[i] != relevant[i - 1]]
    return Sample(
        task=task,
        context=tokens[: batch.question_start],
        question=tokens[batch.question_start : answer_start],
        answer=tokens[answer_start:],
        given=tuple(not flag for flag in produced[answer_start:]),
        evidence=tuple(zip(edges[::2], edges[1::2], strict=True)),
        seed=seed,
        row=row,
    )


def make_samples(task: str, n_tokens: int, n_samples: int, seed: int = 0, rows_per_seed: int = 4) -> list[Sample]:
    """Draw samples of a task on the CPU: the same ones for every arm, machine and batch size.

    Parameters
    ----------
    task : str
        Key of `TASKS`.
    n_tokens : int
        Tokens of each sample, answer included; at least 256.
    n_samples : int
        How many.
    seed : int, default=0
        Of the first batch; later batches count up, so that seeds `rows / rows_per_seed` apart never overlap.
    rows_per_seed : int, default=4
        Samples drawn together. They share lengths (so they run in one batch) and, in "kv_rand", the kind of
        wording.

    Returns
    -------
    list of Sample
        `n_samples` different samples.

    Raises
    ------
    ValueError
        If the task is unknown, a row too short, or a count not positive.
    """
    if n_samples < 1 or rows_per_seed < 1:
        msg = f"n_samples and rows_per_seed must be at least 1, got {n_samples} and {rows_per_seed}"
        raise ValueError(msg)
    samples: list[Sample] = []
    batch_seed = seed
    while len(samples) < n_samples:
        batch = make_rows(task, n_tokens, rows_per_seed, batch_seed)
        wanted = min(rows_per_seed, n_samples - len(samples))
        samples += [cut_row(task, batch, row, batch_seed) for row in range(wanted)]
        batch_seed += 1
    return samples
