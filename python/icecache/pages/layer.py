"""All tokens of one layer: sink and window on the device, the middle in one forest of pages per row.

Layers of a group share their forests (`shelf`). Forest token ``i`` of a row is its position ``sink_tokens + i``. Tokens
move from the window to the forest in batches of 16, at the start of a step; until then they stay in the window, so
nothing is ever in neither place. Tokens that were handed over (`ahead`) are inserted where nobody sees them yet, and
count as window tokens until the forest adopts them.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from icecache import _core
from icecache.config import PAGE_TOKENS
from icecache.pages.ahead import Handed, adopt_due, followers, oldest, whole_groups
from icecache.pages.chunk import Before
from icecache.pages.move import Move, insert
from icecache.pages.near import NearBuffer, NearRow
from icecache.pages.offload import wait
from icecache.pages.padding import PaddingLog
from icecache.pages.shelf import Pair, Shelf, columns
from icecache.pages.store import as_bytes, to_host_together
from icecache.stats import Recorder


@dataclass(frozen=True, slots=True)
class Layout:
    """Which tokens stay near, and whether the others are kept at all (StreamingLLM forgets them)."""

    sink_tokens: int
    window_tokens: int
    keeps_middle: bool = True

    def continues(self, other: Layout) -> bool:
        """Whether a sequence cut for `other` can go on like this: what leaves a narrower window joins the pages."""
        alike = self.sink_tokens == other.sink_tokens and self.keeps_middle and other.keeps_middle
        return self == other or (alike and self.window_tokens <= other.window_tokens)


class LayerPages:
    """Keys and values of one layer, one ragged row per sequence of the batch. Made by :func:`icecache.pages.build`.

    Parameters
    ----------
    shelf, place
        Forests, and which of the layers that share them this is; 0 leads.
    """

    def __init__(
        self, layout: Layout, layer: int, near: NearBuffer, shelf: Shelf, place: int, padding: PaddingLog
    ) -> None:
        self.layout, self.layer, self.near = layout, layer, near
        self.shelf, self.place, self.padding = shelf, place, padding
        self.forgotten = [0] * near.n_rows
        """Middle tokens dropped for good, per row; stays 0 unless the layout forgets the middle."""
        self.handed: list[Handed | None] = [None] * near.n_rows
        """Per row the oldest window tokens that are being inserted unseen."""
        self._job: Future[None] | None = None
        self._before: Before | None = None

    @property
    def store(self) -> _core.PageStore:
        """Where the pages lie."""
        return self.shelf.store

    @property
    def forests(self) -> list[_core.Forest]:
        """One per row; none if the middle is forgotten."""
        return self.shelf.forests

    @property
    def changes(self) -> int:
        """How often the forests were written to."""
        return self.shelf.changes

    def await_job(self, job: Future[None], before: Before | None = None) -> None:
        """Note that tokens are on their way to the host until `job` is done; `before`: what to be if it fails."""
        self._job, self._before = job, before

    def settle(self, *, check: bool = True) -> None:
        """End a step: wait for tokens that are still on their way to the host.

        Raises
        ------
        BadTensorError, PoolExhaustedError
            If they could not be stored, and `check` is set; pages of a first prompt are useless then, those of a later
            chunk are as they were before it.
        """
        self.shelf.choices.clear()
        job, before, self._job, self._before = self._job, self._before, None, None
        if job is not None and before is not None and job.exception() is not None:
            before.restore(self)
        wait(job, check=check)

    @property
    def n_rows(self) -> int:
        """Rows of the batch."""
        return self.near.n_rows

    def middle(self, row: int) -> int:
        """Tokens of `row` between sink and window: in the forest, or forgotten."""
        return self.shelf.count(self.place, row) if self.forests else self.forgotten[row]

    def length(self, row: int) -> int:
        """Tokens of `row` (padding not counted)."""
        return self.near.count(row) + self.middle(row)

    def index_bytes(self) -> int:
        """Bytes of the index beside the pages; those of a group count at its leader."""
        return sum(forest.index_bytes() for forest in self.forests) if self.place == 0 else 0

    def append(self, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor | None) -> None:
        """Add tokens ``[B, H, n, D]`` behind the window; `valid` bool (B, n) on the CPU marks padding."""
        if valid is None and self.near.can_append():
            self.near.append(keys, values)
        else:
            rows = []
            for b in range(self.n_rows):
                new = valid_tokens(keys[b], valid, b), valid_tokens(values[b], valid, b)
                rows.append(self.near.row(b).extended(*new, self.layout.sink_tokens))
            self.near = NearBuffer(rows, self.layout.sink_tokens)
        self.padding.append(keys.shape[2], valid)  # last: without memory for the tokens there must be no record of them

    def drop_unrecorded(self) -> None:
        """Forget new tokens whose positions were never recorded: Ctrl-C came between the two."""
        recorded = self.padding.valid().sum(1).tolist()
        extra = [self.length(b) - n for b, n in enumerate(recorded)]
        if extra[0] > 0:
            self.near.truncate(extra[0])

    def any_due(self) -> bool:
        """Whether some row has tokens that are due: the question of every step, and mostly no."""
        least = PAGE_TOKENS if self.layout.keeps_middle else 1
        return self.near.stop - min(self.near.starts, default=0) >= self.layout.window_tokens + least

    def due(self) -> list[int]:
        """Window tokens of each row that have to leave before the next search."""
        over = [self.near.window_count(b) - self.layout.window_tokens for b in range(self.n_rows)]
        if not self.layout.keeps_middle:
            return [max(n, 0) for n in over]
        return [max(n, 0) // PAGE_TOKENS * PAGE_TOKENS for n in over]

    def crop(self, n_positions: int) -> None:
        """Forget the newest `n_positions` positions (padding included), and refill the window from the forest."""
        removed = self.padding.crop(n_positions)
        left = [self.near.window_count(b) - n for b, n in enumerate(removed)]
        needed = [self.layout.window_tokens if self.middle(b) else 0 for b in range(self.n_rows)]
        needed = [max(n, 0 if h is None else h.n_tokens) for n, h in zip(needed, self.handed, strict=True)]
        enough = (n >= least for n, least in zip(left, needed, strict=True))
        if len(set(removed)) == 1 and all(enough):
            self.near.truncate(removed[0])
            return
        self.handed = [None] * self.n_rows
        self.near = NearBuffer([self._cropped(b, n) for b, n in enumerate(removed)], self.layout.sink_tokens)

    def _cropped(self, b: int, n_tokens: int) -> NearRow:
        """Near row after `n_tokens` were cut off; the forest is cut to match."""
        row, layout = self.near.row(b), self.layout
        window = max(self.near.window_count(b) - n_tokens, 0)
        rest = n_tokens - (self.near.window_count(b) - window)
        keys, values = row.window_keys[:, :window], row.window_values[:, :window]
        sink = self.near.sinks[b]
        if self.forests:
            middle = self.middle(b)
            stop = max(middle - rest, 0)
            sink -= max(rest - middle, 0)
            start = max(stop - max(layout.window_tokens - window, 0), 0)
            back_keys, back_values = read_back(self.forests[b], start, stop, keys, values, self.place)
            keys, values = torch.cat([back_keys, keys], 1), torch.cat([back_values, values], 1)
            if start < middle:
                self.shelf.crop(self.place, b, start)
        elif rest > 0:
            # What StreamingLLM forgot cannot come back: the window is shorter until it fills again.
            sink -= max(rest - self.forgotten[b], 0)
            self.forgotten[b] = max(self.forgotten[b] - rest, 0)
        return NearRow(row.sink_keys[:, :sink], row.sink_values[:, :sink], keys, values)

    def select(self, rows: Sequence[int]) -> LayerPages:
        """Rows in this order: the first use of a row keeps its forest, repeats fork it (copy on write)."""
        return self._with(self.shelf.select(self.place, rows), rows)

    def fork(self) -> LayerPages:
        """Independent copy: pages are shared until one side writes."""
        return self._with(self.shelf.fork(self.place), range(self.n_rows))

    def _with(self, shelf: Shelf, rows: Sequence[int]) -> LayerPages:
        near, padding = self.near.select(rows), self.padding.select(rows)
        pages = LayerPages(self.layout, self.layer, near, shelf, self.place, padding)
        pages.forgotten = [self.forgotten[b] for b in rows]
        pages.handed = [self.handed[b] for b in rows]
        return pages


def valid_tokens(tensor: torch.Tensor, valid: torch.Tensor | None, row: int) -> torch.Tensor:
    """Tokens ``[H, n, D]`` of `row` that are not padding."""
    if valid is None or bool(valid[row].all()):
        return tensor
    index = valid[row].nonzero().flatten()
    first = int(index[0]) if len(index) else tensor.shape[1]
    if len(index) == tensor.shape[1] - first:  # left padding: a view is enough
        return tensor[:, first:]
    return tensor.index_select(1, index.to(tensor.device))


def read_back(
    forest: _core.Forest, start: int, stop: int, like_keys: torch.Tensor, like_values: torch.Tensor, place: int = 0
) -> Pair:
    """Tokens ``start .. stop`` of the layer at `place` as tensors ``[H, stop - start, D]`` like the given ones."""
    shape = (forest.n_kv_heads, stop - start)
    keys = torch.empty(*shape, like_keys.shape[-1], dtype=like_keys.dtype)
    values = torch.empty(*shape, like_values.shape[-1], dtype=like_values.dtype)
    if stop > start:
        raw_keys, raw_values = as_bytes(keys), as_bytes(values)
        forest.read(start, stop, raw_keys, raw_values, *columns(place, raw_keys.shape[-1], raw_values.shape[-1]))
    return keys.to(like_keys.device), values.to(like_values.device)


def drain(pool: _core.Pool, recorder: Recorder, layers: Sequence[LayerPages]) -> None:
    """Move the tokens that are due from the windows of all `layers` to their forests.

    What was handed over is adopted, the rest is inserted in one call. Layers that share pages move theirs together:
    tokens stay where they are until all of a group are among `layers`. If this raises, every token is still in its
    window or in its forest, and all sequences are usable.
    """
    if not any(pages.any_due() for pages in layers):
        return
    groups = whole_groups(layers)
    adopt_due(recorder, groups)
    lengths: list[tuple[list[LayerPages], list[int], list[int]]] = []
    places: list[tuple[list[LayerPages], int]] = []
    tensors: list[torch.Tensor] = []
    for group in groups:
        leader, counts = group[0], group[0].due()
        if not any(counts):
            continue
        if not leader.layout.keeps_middle:
            for pages in group:
                pages.forgotten = [a + b for a, b in zip(pages.forgotten, counts, strict=True)]
                pages.near.drop_oldest(counts)
            continue
        lengths.append((group, counts, [len(forest) for forest in leader.forests]))
        for b, n in enumerate(counts):
            if n:
                tensors += oldest(group, b, n)
                places.append((group, b))
    if not places:
        return
    hosted = to_host_together(tensors)
    moves = [
        Move(group[0].layer, b, group[0].forests[b], keys, values, followers(group))
        for (group, b), keys, values in zip(places, hosted[::2], hosted[1::2], strict=True)
    ]
    try:
        insert(pool, recorder, moves)
    finally:
        # Rows that went in before another row failed have left their window for good.
        for group, counts, before in lengths:
            forests = group[0].forests
            moved = [n if len(f) > old else 0 for n, f, old in zip(counts, forests, before, strict=True)]
            for pages in group:
                pages.near.drop_oldest(moved)
            group[0].shelf.changes += any(moved)
