"""All tokens of one layer: sink and window on the device, the middle in one forest of pages per row.

Forest token ``i`` of a row is its position ``sink_tokens + i``. Tokens move from the window to the forest in batches of
16, at the start of a step; until then they stay in the window, so nothing is ever in neither place. Tokens that were
handed over (`ahead`) are inserted where nobody sees them yet, and count as window tokens until the forest adopts them.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from icecache import _core
from icecache.config import PAGE_TOKENS
from icecache.pages.ahead import Handed, adopt_due
from icecache.pages.move import Move, insert
from icecache.pages.near import NearBuffer, NearRow
from icecache.pages.offload import Departure, Offload, wait
from icecache.pages.padding import PaddingLog
from icecache.pages.store import Stores, as_bytes, to_host, to_host_together
from icecache.stats import Recorder


@dataclass(frozen=True, slots=True)
class Layout:
    """Which tokens stay near, and whether the others are kept at all (StreamingLLM forgets them)."""

    sink_tokens: int
    window_tokens: int
    keeps_middle: bool = True


class LayerPages:
    """Keys and values of one layer, one ragged row per sequence of the batch."""

    def __init__(
        self,
        layout: Layout,
        layer: int,
        store: _core.PageStore,
        near: NearBuffer,
        forests: list[_core.Forest],
        padding: PaddingLog,
    ) -> None:
        self.layout, self.layer, self.store = layout, layer, store
        self.near, self.forests, self.padding = near, forests, padding
        self.forgotten = [0] * near.n_rows
        """Middle tokens dropped for good, per row; stays 0 unless the layout forgets the middle."""
        self.handed: list[Handed | None] = [None] * near.n_rows
        """Per row the oldest window tokens that are being inserted unseen."""
        self._job: Future[None] | None = None
        self.changes = 0
        """How often the forests were written to: whoever searches a snapshot knows by it when to take a new one."""

    @classmethod
    def build(
        cls,
        layout: Layout,
        layer: int,
        stores: Stores,
        pool: _core.Pool,
        recorder: Recorder,
        keys: torch.Tensor,
        values: torch.Tensor,
        valid: torch.Tensor | None,
        offload: Offload | None = None,
    ) -> LayerPages:
        """Take over a whole prompt.

        Parameters
        ----------
        keys, values : torch.Tensor
            (n_rows, n_kv_heads, n_positions, dim), any device.
        valid : torch.Tensor or None
            Bool (n_rows, n_positions) on the CPU; False: padding. None: no padding.
        offload : Offload or None
            Takes the tokens to the host in the background; call `settle` before anything else then.

        Raises
        ------
        BadTensorError, PoolExhaustedError
            Nothing is kept then.
        """
        n_rows, n_heads, n_positions, key_dim = keys.shape
        store = stores.get(key_dim, values.shape[-1], keys.dtype, keys.device)
        padding = PaddingLog(n_rows)
        padding.append(n_positions, valid)
        near, leaving, forests, forgotten = [], [], [], []
        for b in range(n_rows):
            row_keys, row_values = valid_tokens(keys[b], valid, b), valid_tokens(values[b], valid, b)
            n_tokens = row_keys.shape[1]
            sink = min(n_tokens, layout.sink_tokens)
            first = max(sink, n_tokens - layout.window_tokens)
            near.append(NearRow(row_keys[:, :sink], row_values[:, :sink], row_keys[:, first:], row_values[:, first:]))
            forgotten.append(0 if layout.keeps_middle else first - sink)
            if layout.keeps_middle:
                forests.append(_core.Forest(store, n_heads))
            if layout.keeps_middle and first > sink:
                leaving.append(Departure(layer, b, forests[b], row_keys[:, sink:first], row_values[:, sink:first]))
        pages = cls(layout, layer, store, NearBuffer(near, layout.sink_tokens), forests, padding)
        if leaving and offload is not None:
            pages._job = offload.submit(recorder, leaving)
        elif leaving:
            with recorder.part("prefill_offload"):
                moves = [Move(d.layer, d.row, d.forest, to_host(d.keys), to_host(d.values)) for d in leaving]
            insert(pool, recorder, moves)
        pages.forgotten = forgotten
        return pages

    def settle(self, *, check: bool = True) -> None:
        """Wait for a prompt that is still on its way to the host.

        Raises
        ------
        BadTensorError, PoolExhaustedError
            If it could not be stored, and `check` is set; the pages are useless then.
        """
        job, self._job = self._job, None
        wait(job, check=check)

    @property
    def n_rows(self) -> int:
        """Rows of the batch."""
        return self.near.n_rows

    def middle(self, row: int) -> int:
        """Tokens of `row` between sink and window: in the forest, or forgotten."""
        return len(self.forests[row]) if self.forests else self.forgotten[row]

    def length(self, row: int) -> int:
        """Tokens of `row` (padding not counted)."""
        return self.near.count(row) + self.middle(row)

    def index_bytes(self) -> int:
        """Bytes of the index beside the pages."""
        return sum(forest.index_bytes() for forest in self.forests)

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
            forest = self.forests[b]
            stop = max(len(forest) - rest, 0)
            sink -= max(rest - len(forest), 0)
            start = max(stop - max(layout.window_tokens - window, 0), 0)
            back_keys, back_values = read_back(forest, start, stop, keys, values)
            keys, values = torch.cat([back_keys, keys], 1), torch.cat([back_values, values], 1)
            if start < len(forest):
                forest.crop(start)
                self.changes += 1
        elif rest > 0:
            # What StreamingLLM forgot cannot come back: the window is shorter until it fills again.
            sink -= max(rest - self.forgotten[b], 0)
            self.forgotten[b] = max(self.forgotten[b] - rest, 0)
        return NearRow(row.sink_keys[:, :sink], row.sink_values[:, :sink], keys, values)

    def select(self, rows: Sequence[int]) -> LayerPages:
        """Rows in this order: the first use of a row keeps its forest, repeats fork it (copy on write)."""
        seen: set[int] = set()
        forests = []
        for b in rows if self.forests else ():
            forests.append(self.forests[b].fork() if b in seen else self.forests[b])
            seen.add(b)
        near, padding = self.near.select(rows), self.padding.select(rows)
        pages = LayerPages(self.layout, self.layer, self.store, near, forests, padding)
        pages.forgotten = [self.forgotten[b] for b in rows]
        pages.handed = [self.handed[b] for b in rows]
        pages.changes = self.changes + 1
        return pages

    def fork(self) -> LayerPages:
        """Independent copy: pages are shared until one side writes."""
        pages = self.select(range(self.n_rows))
        pages.forests = [forest.fork() for forest in self.forests]
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
    forest: _core.Forest, start: int, stop: int, like_keys: torch.Tensor, like_values: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens ``start .. stop`` of a forest as tensors ``[H, stop - start, D]`` like the given ones."""
    shape = (forest.n_kv_heads, stop - start)
    keys = torch.empty(*shape, like_keys.shape[-1], dtype=like_keys.dtype)
    values = torch.empty(*shape, like_values.shape[-1], dtype=like_values.dtype)
    if stop > start:
        forest.read(start, stop, as_bytes(keys), as_bytes(values))
    return keys.to(like_keys.device), values.to(like_values.device)


def drain(pool: _core.Pool, recorder: Recorder, layers: Sequence[LayerPages]) -> None:
    """Move the tokens that are due from the windows of all `layers` to their forests.

    What was handed over is adopted, the rest is inserted in one call. If this raises, every token is still in its
    window or in its forest, and all sequences are usable.
    """
    adopt_due(recorder, layers)
    plan = [(pages, pages.due()) for pages in layers]
    plan = [(pages, counts) for pages, counts in plan if any(counts)]
    lengths: list[tuple[LayerPages, list[int], list[int]]] = []
    places: list[tuple[LayerPages, int]] = []
    tensors: list[torch.Tensor] = []
    for pages, counts in plan:
        if not pages.layout.keeps_middle:
            pages.forgotten = [a + b for a, b in zip(pages.forgotten, counts, strict=True)]
            pages.near.drop_oldest(counts)
            continue
        lengths.append((pages, counts, [len(forest) for forest in pages.forests]))
        for b, n in enumerate(counts):
            if n:
                row = pages.near.row(b)
                tensors += (row.window_keys[:, :n], row.window_values[:, :n])
                places.append((pages, b))
    if not places:
        return
    hosted = to_host_together(tensors)
    moves = [
        Move(pages.layer, b, pages.forests[b], keys, values)
        for (pages, b), keys, values in zip(places, hosted[::2], hosted[1::2], strict=True)
    ]
    try:
        insert(pool, recorder, moves)
    finally:
        # Rows that went in before another row failed have left their window for good.
        for pages, counts, before in lengths:
            moved = [n if len(f) > old else 0 for n, f, old in zip(counts, pages.forests, before, strict=True)]
            pages.near.drop_oldest(moved)
            pages.changes += any(moved)
