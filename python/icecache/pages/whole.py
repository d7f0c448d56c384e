"""Keys and values of one layer, all of them on the compute device: what the baselines keep.

Dimension key: B rows, H KV heads, C columns, T columns in use, D head dim (keys) or value dim.

Column t of row b is token t of that row (padding is not stored), so rows of a batch differ in where they end. Memory
grows by doubling; a fork shares it until one side writes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from icecache.pages.layer import valid_tokens
from icecache.pages.padding import PaddingLog

_SLACK_COLUMNS = 64


class RowIndex(Protocol):
    """State of a policy that is not made of tensors, one part per row of the batch."""

    def select(self, rows: Sequence[int]) -> RowIndex:
        """Independent copy of these rows, in this order; repeats are allowed."""
        ...


class WholeKV:
    """Keys and values of one layer, and what a policy remembers about them.

    Parameters
    ----------
    keys, values : torch.Tensor
        (B, H, C, D) and (B, H, C, Dv).
    lengths : list of int
        Tokens of each row.
    padding : PaddingLog
        Which positions of the batch were tokens.
    """

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, lengths: list[int], padding: PaddingLog) -> None:
        self.padding, self.lengths, self.n_prompt = padding, lengths, list(lengths)
        self.prompt_positions = padding.n_positions
        """Positions of the dense prefill, padding included."""
        self.state: dict[str, torch.Tensor] = {}
        """Tensors of the policy; axis 0 is the row of the batch. Replaced, never written to."""
        self.index: RowIndex | None = None
        self._keys, self._values = keys, values
        self._shared = False
        self._on_device: dict[str, torch.Tensor] = {}
        self._before: tuple[list[int], dict[str, torch.Tensor]] | None = None

    @classmethod
    def build(cls, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor | None) -> WholeKV:
        """Copy a whole prompt.

        Parameters
        ----------
        keys, values : torch.Tensor
            (B, H, n_positions, D).
        valid : torch.Tensor or None
            Bool (B, n_positions) on the CPU; False: padding. None: no padding.
        """
        n_rows, _, n_positions, _ = keys.shape
        padding = PaddingLog(n_rows)
        padding.append(n_positions, valid)
        lengths = [n_positions] * n_rows if valid is None else valid.sum(1).tolist()
        held = [_zeros(t, max(lengths) + _SLACK_COLUMNS) for t in (keys, values)]
        for source, target in zip((keys, values), held, strict=True):
            if valid is None:
                target[:, :, :n_positions] = source
                continue
            for b, n in enumerate(lengths):
                target[b, :, :n] = valid_tokens(source[b], valid, b)
        return cls(held[0], held[1], lengths, padding)

    @property
    def n_rows(self) -> int:
        """Rows of the batch."""
        return len(self.lengths)

    def length(self, row: int) -> int:
        """Tokens of `row`."""
        return self.lengths[row]

    @property
    def width(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths)

    @property
    def keys(self) -> torch.Tensor:
        """(B, H, T, D), T the longest row; columns past the end of a row hold zeros or what was cropped."""
        return self._keys[:, :, : self.width]

    @property
    def values(self) -> torch.Tensor:
        """(B, H, T, Dv), like `keys`."""
        return self._values[:, :, : self.width]

    def device_lengths(self) -> torch.Tensor:
        """Tokens of each row, int64 (B,) on the device."""
        return self._counts("lengths", self.lengths)

    def device_prompt(self) -> torch.Tensor:
        """Tokens of each row's dense prefill, int64 (B,) on the device."""
        return self._counts("prompt", self.n_prompt)

    def _counts(self, name: str, counts: list[int]) -> torch.Tensor:
        held = self._on_device.get(name)
        if held is None:
            held = self._on_device[name] = torch.tensor(counts, device=self._keys.device)
        return held

    def nbytes(self) -> int:
        """Bytes allocated on the device, those of the policy's state included."""
        return self._keys.nbytes + self._values.nbytes + sum(t.nbytes for t in self.state.values())

    def append(self, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor | None) -> None:
        """Add tokens ``[B, H, n, D]`` at the end of each row; `valid` bool (B, n) on the CPU marks padding."""
        self._before = list(self.lengths), self.state
        n_new = keys.shape[2]
        self._own(self.width + n_new)
        start = self.lengths[0]
        if valid is not None:
            for b, n in enumerate(self.lengths):
                for new, held in ((keys, self._keys), (values, self._values)):
                    tokens = valid_tokens(new[b], valid, b)
                    held[b, :, n : n + tokens.shape[1]] = tokens
            self.lengths = [n + m for n, m in zip(self.lengths, valid.sum(1).tolist(), strict=True)]
            self._on_device.pop("lengths", None)
        else:
            if all(n == start for n in self.lengths):
                self._keys[:, :, start : start + n_new] = keys
                self._values[:, :, start : start + n_new] = values
            else:
                ends = self.device_lengths()[:, None] + torch.arange(n_new, device=keys.device)
                rows = torch.arange(self.n_rows, device=keys.device)[:, None]
                self._keys[rows, :, ends] = keys.transpose(1, 2)
                self._values[rows, :, ends] = values.transpose(1, 2)
            self._on_device["lengths"] = self.device_lengths() + n_new  # before the lengths that it may be made from
            self.lengths = [n + n_new for n in self.lengths]
        self.padding.append(n_new, valid)

    def _own(self, n_columns: int) -> None:
        """Make sure that `n_columns` columns can be written without touching a fork."""
        if n_columns <= self._keys.shape[2] and not self._shared:
            return
        room = self._keys.shape[2] if n_columns <= self._keys.shape[2] else n_columns + n_columns // 2 + _SLACK_COLUMNS
        used = self.width
        grown = [_zeros(t, room) for t in (self._keys, self._values)]
        grown[0][:, :, :used], grown[1][:, :, :used] = self.keys, self.values
        self._keys, self._values, self._shared = grown[0], grown[1], False

    def extend_prompt(self) -> None:
        """Declare everything that is here now to be the dense prefill."""
        self.n_prompt, self.prompt_positions = list(self.lengths), self.padding.n_positions
        self._on_device.pop("prompt", None)

    def settle(self, *, check: bool = True) -> None:
        """Nothing is ever on its way."""

    def crop(self, n_positions: int) -> None:
        """Forget the newest `n_positions` positions (padding included).

        The state of the policy goes back with them if they came in the latest `append`; otherwise it stays: what a
        policy dropped since then does not come back.
        """
        removed = self.padding.crop(n_positions)
        self.lengths = [n - m for n, m in zip(self.lengths, removed, strict=True)]
        self.n_prompt = [min(n, m) for n, m in zip(self.lengths, self.n_prompt, strict=True)]
        self.prompt_positions = min(self.prompt_positions, self.padding.n_positions)
        self._on_device.clear()
        if self._before is not None and self._before[0] == self.lengths:
            self.state = self._before[1]
        self._before = None

    def select(self, rows: Sequence[int]) -> WholeKV:
        """Copy of the given rows, in this order; repeats are allowed."""
        index = torch.tensor(rows, device=self._keys.device)
        new = WholeKV(
            self.keys.index_select(0, index),
            self.values.index_select(0, index),
            [self.lengths[b] for b in rows],
            self.padding.select(rows),
        )
        new._shared = True  # made without room, and perhaps in inference mode: the first write copies
        new.n_prompt, new.prompt_positions = [self.n_prompt[b] for b in rows], self.prompt_positions
        new.state = {name: tensor.index_select(0, index) for name, tensor in self.state.items()}
        new.index = None if self.index is None else self.index.select(rows)
        return new

    def fork(self) -> WholeKV:
        """Independent copy: memory is shared until one side writes."""
        rows = range(self.n_rows)
        new = WholeKV(self._keys, self._values, list(self.lengths), self.padding.select(rows))
        self._shared = new._shared = True
        new.n_prompt, new.prompt_positions, new.state = list(self.n_prompt), self.prompt_positions, self.state
        new.index = None if self.index is None else self.index.select(rows)
        return new


def _zeros(like: torch.Tensor, n_columns: int) -> torch.Tensor:
    """Zeros that may be written in place whether the caller is in inference mode now, or was when they were made."""
    with torch.inference_mode(mode=False):
        shape = (*like.shape[:2], n_columns, like.shape[3])
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
