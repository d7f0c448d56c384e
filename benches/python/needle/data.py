"""Batches of the task mixture, and position jumps.

Dimension key: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from icecache.eval.needle.draw import Draw
from icecache.eval.needle.haystack import Haystack
from icecache.eval.needle.records import Request
from icecache.eval.needle.tasks import TRAINING_BUILDERS
from torch import Tensor

from needle.config import MIXTURE, WARM_UP_RECALL, Plan

TASK_NAMES = tuple(MIXTURE)
REHEARSAL_SHARE = 0.25
REFRESH_STEPS = 150
JUMPS = 3


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows to train on.

    Parameters
    ----------
    tokens, queries : Tensor
        int64 `(B, T)`; queries above 0 mark answers.
    task : Tensor
        int64 `(B,)`, index into `TASK_NAMES`.
    """

    tokens: Tensor
    queries: Tensor
    task: Tensor


class BatchSource:
    """Draws pools of rows of mixed tasks and hands them out batch by batch.

    Parameters
    ----------
    device : torch.device
        Where to draw.
    plan : Plan
        Sizes and seed.
    """

    def __init__(self, device: torch.device, plan: Plan) -> None:
        self.draw = Draw(device, plan.seed + 7)
        self.haystack = Haystack(self.draw, 1 << 23 if device.type == "cuda" else 1 << 18)
        self.plan = plan
        self.pool: list[Batch] = []
        self.refreshed_at = 0

    def discard(self) -> None:
        """Forget the rows drawn ahead (the stage has changed)."""
        self.pool.clear()

    def rows(self, length: int) -> int:
        """Rows of a batch."""
        divisor = (4 if length <= 256 else 2 if length <= 1024 else 1) if self.plan.small_early_batches else 1
        return max(1, self.plan.tokens_per_step // divisor // length)

    def next(self, lengths: Sequence[int], step: int) -> Batch:
        """Hand out a batch of the last of `lengths`, or (a quarter of the pools) of an earlier one as rehearsal.

        Parameters
        ----------
        lengths : sequence of int
            Lengths of the stages up to the current one.
        step : int
            Steps done.

        Returns
        -------
        Batch
            Rows of one length.
        """
        if not self.pool:
            length = lengths[-1]
            if len(lengths) > 1 and float(torch.rand(())) < REHEARSAL_SHARE:
                length = lengths[int(torch.randint(0, len(lengths) - 1, ()))]
            self.fill(length, warm_up=step < self.plan.warm_up_steps)
            if step - self.refreshed_at > REFRESH_STEPS:
                self.haystack.refresh()
                self.refreshed_at = step
        return self.pool.pop()

    def fill(self, length: int, *, warm_up: bool) -> None:
        """Draw a pool: the mixture's counts by one multinomial draw, then shuffled."""
        rows = self.rows(length)
        wanted = max(rows * (8 if self.draw.device.type == "cuda" else 4), 32) // rows * rows
        weights = torch.tensor([MIXTURE[name] for name in TASK_NAMES])
        if warm_up:
            weights[TASK_NAMES.index("mqar")] += WARM_UP_RECALL
        counts = torch.bincount(torch.multinomial(weights, wanted, replacement=True), minlength=len(weights)).tolist()
        tokens, queries, task = [], [], []
        for index, name in enumerate(TASK_NAMES):
            left = counts[index]
            while left > 0:
                n = min(left, max(1, min(wanted // 16, 64)))
                drawn = self.haystack.assemble(TRAINING_BUILDERS[name](self.draw, Request(n, length)), length)
                tokens.append(drawn.tokens)
                queries.append(drawn.queries)
                task += [index] * n
                left -= n
        shuffled = torch.randperm(wanted, device=self.draw.device)
        parts = (torch.cat(tokens), torch.cat(queries), torch.tensor(task, device=self.draw.device))
        batches = zip(*(part[shuffled].split(rows) for part in parts), strict=True)
        self.pool = [Batch(*batch) for batch in batches]


def jumping_positions(draw: Draw, rows: int, length: int, max_positions: int, jump_share: float) -> Tensor:
    """Positions that visit long distances in short rows (PoSE).

    Parameters
    ----------
    draw : Draw
        Source of randomness.
    rows, length : int
        Shape of the result.
    max_positions : int
        Exclusive bound of a position.
    jump_share : float
        Share of rows that jump, at three random places, by a random total (small ones more often).

    Returns
    -------
    Tensor
        int64 `(rows, length)`, strictly increasing.
    """
    plain = torch.arange(length, device=draw.device).expand(rows, length)
    if max_positions <= length or jump_share <= 0:
        return plain
    places = draw.integers(1, length, rows, JUMPS)
    total = (max_positions - length) * draw.uniform(rows, 1) ** 2
    sizes = draw.uniform(rows, JUMPS)
    sizes = (sizes / sizes.sum(1, keepdim=True) * total).long()
    jumped = torch.zeros(rows, length, dtype=torch.long, device=draw.device).scatter_add_(1, places, sizes).cumsum(1)
    return plain + jumped * (draw.uniform(rows, 1) < jump_share)
