"""Which logical positions of a batch are padding. Pads are never stored, so rows of a batch are ragged."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch


class PaddingLog:
    """Run-length record of the positions Hugging Face counts, pads included.

    A long decode is one run, so a step costs O(1) whatever the length.
    Invariant: masks are bool CPU tensors (n_rows, n); a mask of None means that every position of the run is a token.
    """

    def __init__(self, n_rows: int) -> None:
        self.n_rows = n_rows
        self._runs: list[tuple[int, torch.Tensor | None]] = []
        self._leading: tuple[list[torch.Tensor | None], list[int] | None] | None = None
        """What `leading` said of which runs."""

    @property
    def n_positions(self) -> int:
        """Positions recorded, padding included."""
        return sum(length for length, _ in self._runs)

    def append(self, n_positions: int, valid: torch.Tensor | None) -> None:
        """Add `n_positions` positions; `valid` is bool (n_rows, n_positions) on the CPU, None: all are tokens."""
        if n_positions == 0:
            return
        if valid is None and self._runs and self._runs[-1][1] is None:
            self._runs[-1] = (self._runs[-1][0] + n_positions, None)
        else:
            self._runs.append((n_positions, valid))

    def crop(self, n_positions: int) -> list[int]:
        """Drop the last `n_positions` positions; returns how many of them were tokens, per row."""
        tokens = [0] * self.n_rows
        while n_positions:
            length, valid = self._runs.pop()
            cut = min(length, n_positions)
            counts = [cut] * self.n_rows if valid is None else valid[:, length - cut :].sum(1).tolist()
            tokens = [a + b for a, b in zip(tokens, counts, strict=True)]
            if cut < length:
                self._runs.append((length - cut, None if valid is None else valid[:, : length - cut]))
            n_positions -= cut
        return tokens

    def select(self, rows: Sequence[int]) -> PaddingLog:
        """Log of the given rows, in this order; repeats are allowed."""
        log = PaddingLog(len(rows))
        index = torch.tensor(rows, dtype=torch.long)
        log._runs = [(n, None if valid is None else valid[index]) for n, valid in self._runs]
        return log

    def leading(self) -> list[int] | None:
        """Per row the positions of padding before its first token; None: some padding comes later."""
        runs = self._runs
        while runs and runs[-1][1] is None:
            runs = runs[:-1]
        if not runs:
            return [0] * self.n_rows
        key = [valid for _, valid in runs]
        known = self._leading
        if known is None or len(key) != len(known[0]) or any(map(operator.is_not, key, known[0])):
            valid = torch.cat([torch.ones(self.n_rows, n, dtype=torch.bool) if v is None else v for n, v in runs], 1)
            pads = (~valid).sum(1)
            before = (~valid).int().cumprod(1).sum(1)
            known = self._leading = key, pads.tolist() if torch.equal(before, pads) else None
        return known[1]

    def valid(self) -> torch.Tensor:
        """Bool (n_rows, positions): which positions are tokens."""
        parts = [torch.ones(self.n_rows, n, dtype=torch.bool) if v is None else v for n, v in self._runs]
        return torch.cat([torch.ones(self.n_rows, 0, dtype=torch.bool), *parts], dim=1)
