"""The pages that the layers of a group share: one forest per row, laid out by the first layer, the leader.

Dimension key: D key dim, E value dim, n layers of the group.

A stored row is ``[K0 | V0 K1 V1 ... ]``: the leader's key is what the index knows, everything else is its value. So
what moves a row (a split, a seal, a crop) moves the keys and values of all layers, and a page choice holds for all.
Layer j of the group, its *place*, has its key at element ``j (D + E)`` of the row, and its value behind it.

transformers asks layer after layer to crop, reorder or copy itself. A forest is cut when the last layer has asked, and
the first layer that asks for other rows makes the shelf that the others then get too.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from icecache import _core
from icecache.config import PAGE_TOKENS
from icecache.errors import CacheStateError

Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Choice:
    """Pages that the leader chose for some rows in one step; keeps them as they were."""

    rows: list[int]
    selection: _core.Selection
    everything: bool
    """Whether these are all pages of the rows."""


class Shelf:
    """Forests of one group of layers.

    Parameters
    ----------
    store : PageStore
        Of rows of `row_dim` elements behind the leader's key.
    forests : list of Forest
        One per row of the batch; none if the middle is forgotten.
    n_places : int
        Layers that share them.
    """

    def __init__(self, store: _core.PageStore, forests: list[_core.Forest], n_places: int) -> None:
        self.store, self.forests, self.n_places = store, forests, n_places
        self.changes = 0
        """How often the forests were written to: whoever searches a snapshot knows by it when to take a new one."""
        self.choices: dict[int, list[Choice]] = {}
        """What the leader chose in the step under way, by the number of positions it had then."""
        self._kept: list[list[int]] | None = None
        """Per place and row: tokens kept by layers that were cropped while others wait. None: all keep all."""
        self._made: weakref.ref[Shelf] | None = None
        self._made_for: tuple[bool, tuple[int, ...]] | None = None
        self._taken: set[int] = set()

    def count(self, place: int, row: int) -> int:
        """Tokens of `row` that the layer at `place` has here."""
        return len(self.forests[row]) if self._kept is None else self._kept[place][row]

    def check_even(self) -> None:
        """Raise CacheStateError if a crop has reached some of the layers only."""
        if self._kept is not None:
            msg = "only some of the layers that share pages were cropped; crop the cache, not single layers"
            raise CacheStateError(msg)

    def crop(self, place: int, row: int, n_tokens: int) -> None:
        """Let the layer at `place` keep the first `n_tokens` tokens of `row`; the others may still need more."""
        if self._kept is None:
            self._kept = [[len(forest) for forest in self.forests] for _ in range(self.n_places)]
        self._kept[place][row] = n_tokens
        longest = max(kept[row] for kept in self._kept)
        if longest < len(self.forests[row]):
            self.forests[row].crop(longest)
            self.changes += 1
        if all(kept == [len(forest) for forest in self.forests] for kept in self._kept):
            self._kept = None

    def select(self, place: int, rows: Sequence[int]) -> Shelf:
        """Take rows in this order: the first use of a row keeps its forest, repeats fork it (copy on write)."""
        return self._derived(place, rows, forked=False)

    def fork(self, place: int) -> Shelf:
        """Independent copy: pages are shared until one side writes."""
        return self._derived(place, range(len(self.forests)), forked=True)

    def _derived(self, place: int, rows: Sequence[int], *, forked: bool) -> Shelf:
        """Make a new shelf, or join the one that another layer of the group has asked for."""
        made, wanted = None if self._made is None else self._made(), (forked, tuple(rows))
        if made is None or wanted != self._made_for or place in self._taken:
            seen: set[int] = set()
            forests = []
            for b in rows if self.forests else ():
                forests.append(self.forests[b].fork() if forked or b in seen else self.forests[b])
                seen.add(b)
            made = Shelf(self.store, forests, self.n_places)
            made.changes = self.changes + 1
            if self._kept is not None:
                made._kept = [[kept[b] for b in rows] for kept in self._kept]
            self._made, self._made_for, self._taken = weakref.ref(made), wanted, set()
        self._taken.add(place)
        return made


def row_dim(key_dim: int, value_dim: int, n_places: int) -> int:
    """Elements of a row behind the leader's key."""
    return value_dim + (n_places - 1) * (key_dim + value_dim)


def columns(place: int, key_bytes: int, value_bytes: int) -> tuple[int, int]:
    """First byte of the key and of the value of the layer at `place` in a row, the leader's key included."""
    start = place * (key_bytes + value_bytes)
    return start, start + key_bytes


def page_strides(place: int, key_dim: int, value_dim: int, n_places: int) -> tuple[int, int, int, int]:
    """Elements from a page's address to the first key of the layer at `place`, from key to key, and for its values."""
    width, values = row_dim(key_dim, value_dim, n_places), PAGE_TOKENS * key_dim
    if place == 0:
        return 0, key_dim, values, width
    key, value = (values + x - key_dim for x in columns(place, key_dim, value_dim))
    return key, width, value, width


def joined(pairs: Sequence[Pair]) -> Pair:
    """Join all places to rows: the leader's keys ``[..., D]``, and what stands behind them ``[..., row_dim]``."""
    (keys, values), followers = pairs[0], pairs[1:]
    if not followers:
        return keys, values
    return keys, torch.cat([values, *(tensor for pair in followers for tensor in pair)], -1)
