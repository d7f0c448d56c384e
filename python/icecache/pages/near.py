"""Keys and values that stay on the compute device: the first tokens (sink) and the newest ones (window).

Dimension key: B rows, H KV heads, C columns, D head dim (keys) or value dim.

One buffer ``[B, H, C, D]`` per layer. Columns ``0 .. sink_tokens`` hold the sink, the window follows. Windows end at
the same column in every row, so a decoded token of a ragged batch is written with one slice; rows differ in where
their window starts.

Invariant: the tokens of row b are columns ``0 .. sinks[b]`` and ``starts[b] .. stop``, in order of position; a row
whose sink is not full has an empty window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

_SLACK_COLUMNS = 96
"""Columns allocated ahead: a decode step then reallocates only after long chunks."""


@dataclass(frozen=True, slots=True)
class NearRow:
    """One row as tensors ``[H, n, D]``."""

    sink_keys: torch.Tensor
    sink_values: torch.Tensor
    window_keys: torch.Tensor
    window_values: torch.Tensor

    def extended(self, keys: torch.Tensor, values: torch.Tensor, sink_tokens: int) -> NearRow:
        """Row with tokens ``[H, n, D]`` added at the end; they fill the sink first."""
        missing = min(sink_tokens - self.sink_keys.shape[1], keys.shape[1])
        return NearRow(
            torch.cat([self.sink_keys, keys[:, :missing]], 1),
            torch.cat([self.sink_values, values[:, :missing]], 1),
            torch.cat([self.window_keys, keys[:, missing:]], 1),
            torch.cat([self.window_values, values[:, missing:]], 1),
        )


class NearBuffer:
    """Sink and window of every row of one layer.

    Parameters
    ----------
    rows : sequence of NearRow
        At least one; all on one device, of one dtype.
    sink_tokens : int
        Size of the sink.
    """

    def __init__(self, rows: Sequence[NearRow], sink_tokens: int) -> None:
        self.sink_tokens = sink_tokens
        self.sinks = [row.sink_keys.shape[1] for row in rows]
        longest = max(row.window_keys.shape[1] for row in rows)
        self.stop = sink_tokens + longest
        self.starts = [self.stop - row.window_keys.shape[1] for row in rows]
        self.fixed = False
        """Whether the memory belongs to a decode step that was captured with its address: never reallocated to save
        space, and gaps are closed only when there is no column left."""
        self.keys = self._filled([(row.sink_keys, row.window_keys) for row in rows])
        self.values = self._filled([(row.sink_values, row.window_values) for row in rows])
        self._mask: torch.Tensor | None = None

    def _filled(self, parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        n_heads, _, dim = parts[0][0].shape
        # Zeros, not empty: masked columns are multiplied by a zero weight, and 0 * NaN is NaN.
        buffer = _zeros_like(parts[0][0], len(parts), n_heads, self.stop + _SLACK_COLUMNS, dim)
        for b, (sink, window) in enumerate(parts):
            buffer[b, :, : self.sinks[b]] = sink
            buffer[b, :, self.starts[b] : self.stop] = window
        return buffer

    @property
    def n_rows(self) -> int:
        """Rows of the batch."""
        return len(self.sinks)

    def window_count(self, row: int) -> int:
        """Tokens in the window of `row`."""
        return self.stop - self.starts[row]

    def count(self, row: int) -> int:
        """Tokens of `row` held here."""
        return self.sinks[row] + self.window_count(row)

    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.keys.nbytes + self.values.nbytes

    def row(self, b: int) -> NearRow:
        """Take views of row `b`."""
        sink, window = slice(0, self.sinks[b]), slice(self.starts[b], self.stop)
        return NearRow(
            self.keys[b, :, sink], self.values[b, :, sink], self.keys[b, :, window], self.values[b, :, window]
        )

    def can_append(self) -> bool:
        """Whether new tokens go to the window in every row (all sinks are full)."""
        return all(n == self.sink_tokens for n in self.sinks)

    def append(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Add tokens ``[B, H, n, D]`` to every window; demands `can_append`."""
        assert self.can_append(), "a sink is not full: rebuild the row with NearRow.extended"
        n_new = keys.shape[2]
        if self.stop + n_new > self.keys.shape[2]:
            self.own(self.stop + n_new)
        self.keys[:, :, self.stop : self.stop + n_new] = keys
        self.values[:, :, self.stop : self.stop + n_new] = values
        self.stop += n_new
        self._mask = None

    def own(self, n_columns: int) -> None:
        """Move to new memory with room for `n_columns` columns and some more."""
        self.keys, self.values = (self._resized(t, n_columns) for t in (self.keys, self.values))
        self.fixed = False

    def move_to(self, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Move to the given memory ``[B, H, C, D]`` and ``[B, H, C, Dv]``, which is never reallocated from then on.

        Raises
        ------
        ValueError
            If the live columns do not fit.
        """
        self._close_gap()
        if self.stop > keys.shape[2]:
            msg = f"keys: expected room for {self.stop} columns, got {keys.shape[2]}"
            raise ValueError(msg)
        for source, target in ((self.keys, keys), (self.values, values)):
            target[:, :, : self.stop] = source[:, :, : self.stop]
            target[:, :, self.stop :] = 0  # masked columns are multiplied by a zero weight, and 0 * NaN is NaN
        self.keys, self.values, self.fixed = keys, values, True

    def reserve_one(self) -> None:
        """Make sure that one more column can be written without another allocation; demands `can_append`."""
        if self.stop == self.keys.shape[2]:
            self._close_gap()
        assert self.stop < self.keys.shape[2], "the window is longer than a decode step allows"

    def count_one(self) -> None:
        """Count a column that somebody else wrote at `stop`."""
        self.stop += 1
        self._mask = None

    def _resized(self, tensor: torch.Tensor, n_columns: int) -> torch.Tensor:
        n_rows, n_heads, _, dim = tensor.shape
        grown = _zeros_like(tensor, n_rows, n_heads, n_columns + _SLACK_COLUMNS, dim)
        grown[:, :, : self.stop] = tensor[:, :, : self.stop]
        return grown

    def drop_oldest(self, counts: Sequence[int]) -> None:
        """Forget the `counts[b]` oldest window tokens of each row."""
        self.starts = [start + n for start, n in zip(self.starts, counts, strict=True)]
        self._mask = None
        if self.fixed:
            return
        self._close_gap()
        if self.keys.shape[2] > 2 * (self.stop + _SLACK_COLUMNS):  # a long chunk has left: give its memory back
            self.own(self.stop)

    def _close_gap(self) -> None:
        """Move the windows to the left by as many columns as all rows have free before them."""
        gap = min(self.starts) - self.sink_tokens
        if gap <= 0:
            return
        pair = self.keys, self.values
        # Clones: source and target overlap. Both before the first write: there may be memory for only one.
        live = [tensor[:, :, self.sink_tokens + gap : self.stop].clone() for tensor in pair]
        for tensor, columns in zip(pair, live, strict=True):
            tensor[:, :, self.sink_tokens : self.stop - gap] = columns
        self.starts = [start - gap for start in self.starts]
        self.stop -= gap
        self._mask = None

    def truncate(self, n_tokens: int) -> None:
        """Forget the newest `n_tokens` of every row; each window must hold as many."""
        assert all(self.window_count(b) >= n_tokens for b in range(self.n_rows))
        self.stop -= n_tokens
        self._mask = None

    def select(self, rows: Sequence[int]) -> NearBuffer:
        """Copy of the given rows, in this order; repeats are allowed."""
        new = object.__new__(NearBuffer)
        index = torch.tensor(rows, dtype=torch.long, device=self.keys.device)
        new.sink_tokens, new.stop, new.fixed, new._mask = self.sink_tokens, self.stop, False, None
        new.sinks, new.starts = [self.sinks[b] for b in rows], [self.starts[b] for b in rows]
        new.keys, new.values = (_rows_of(tensor, index) for tensor in (self.keys, self.values))
        return new

    def view(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Keys and values ``[B, H, C, D]`` and a bool mask ``[B, C]`` of live columns (None: all are live)."""
        keys, values = self.keys[:, :, : self.stop], self.values[:, :, : self.stop]
        if self.can_append() and all(start == self.sink_tokens for start in self.starts):
            return keys, values, None
        if self._mask is None:
            bounds = torch.tensor([self.sinks, self.starts]).to(self.keys.device)
            columns = torch.arange(self.stop, device=self.keys.device)
            self._mask = (columns < bounds[0][:, None]) | (columns >= bounds[1][:, None])
        return keys, values, self._mask


def _zeros_like(tensor: torch.Tensor, *shape: int) -> torch.Tensor:
    """Zeros that may be written in place whether the caller is in inference mode now, or was when they were made."""
    with torch.inference_mode(mode=False):
        return torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)


def _rows_of(tensor: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Copy of the rows of `index`, which may be written in place like `_zeros_like`."""
    rows = _zeros_like(tensor, len(index), *tensor.shape[1:])
    return torch.index_select(tensor, 0, index, out=rows)
