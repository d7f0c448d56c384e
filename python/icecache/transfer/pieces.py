"""All tokens of a row, brought to the device in pieces: beside the computation, and never all of them at once.

Dimension key: H KV heads, N pages of all heads (head after head), T tokens of a piece, D head dim (keys) or value dim.

On a GPU a kernel reads the pages where they lie, in page-locked memory, on a stream of its own. Two pieces are under
way: while one is attended to, the next one crosses the bus. The first ones are short, so that the computation soon has
something to do, and each is at most half as long again as the one before: 4096 queries in groups of four attend to a
piece in the time in which a piece that much longer arrives (8 KV heads of 128, bfloat16, an H200).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType

import numpy as np
import numpy.typing as npt
import torch

from icecache import _core
from icecache.pages import LayerPages, page_strides, read_back
from icecache.stats import Recorder
from icecache.transfer.mailbox import ADDRESS_BITS

Pair = tuple[torch.Tensor, torch.Tensor]

FIRST_TOKENS = 4096
"""Tokens of the first piece."""
BLOCK_TOKENS = 4096
"""Tokens of a block, 16 MiB for 8 heads of 128 in bfloat16."""
PIECE_BYTES = 128 << 20
"""Most bytes of a piece; two are on the device."""
_LIVE = np.unpackbits(np.arange(1 << 16, dtype=np.uint16).view(np.uint8).reshape(-1, 2), axis=1).sum(1, dtype=np.int64)
"""Number of bits set, by the upper 16 bits of a page word."""


def piece_cuts(n_tokens: int, most: int, first: int = FIRST_TOKENS) -> list[tuple[int, int]]:
    """Cut ``0 .. n_tokens`` into pieces of at most `most`, each at most half as long again as the one before."""
    cuts, start, size = [], 0, min(first, most)
    while start < n_tokens:
        stop = min(start + size, n_tokens)
        cuts.append((start, stop))
        start, size = stop, min(size + size // 2, most)
    return cuts


@dataclass(frozen=True, slots=True)
class Listed:
    """The pages of a row, as `page_gather` takes them.

    Parameters
    ----------
    words : numpy.ndarray
        int64 (N,): addresses and live slots.
    starts : numpy.ndarray
        int64 (N,): tokens before each page, those of the heads before included.
    n_tokens : int
        Of each head.
    held : Mirror
        Keeps the pages as they are.
    """

    words: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]
    n_tokens: int
    held: _core.Mirror

    def spans(self, first: int, stop: int, n_heads: int) -> npt.NDArray[np.int32]:
        """Pages of each head with tokens ``first .. stop``, int32 (H, 2)."""
        base = np.arange(n_heads) * self.n_tokens
        begin = np.searchsorted(self.starts, base + first, side="right") - 1
        end = np.searchsorted(self.starts, base + stop, side="left")
        return np.stack([begin, end], 1).astype(np.int32)


def list_pages(pool: _core.Pool, forest: _core.Forest) -> Listed:
    """List all pages of a forest that hold a token; about 20 ns a page."""
    mirror = _core.Mirror()
    needed = mirror.update(pool, [forest], 0)[-1]
    _, words, _, _, _ = mirror.update(pool, [forest], needed)
    counts = _LIVE[words.view(np.uint64) >> np.uint64(ADDRESS_BITS)]
    n_tokens = len(forest)
    assert counts.sum() == n_tokens * forest.n_kv_heads, "every token is in exactly one page of each head"
    return Listed(words, np.cumsum(counts) - counts, n_tokens, mirror)


class Pieces:
    """One row on its way: enter, iterate once over keys and values ``[H, T, D]``, leave.

    Each pair is valid until the next one is asked for, in the order of the current stream.
    """

    def __init__(self, reader: PageReader, pages: LayerPages, row: int, pool: _core.Pool, recorder: Recorder) -> None:
        self._reader, self._pages, self._row = reader, pages, row
        self._near = pages.near.row(row)
        self._listed: Listed | None = None
        forest = pages.forests[row] if pages.forests else None
        if forest is not None and len(forest):
            self._listed = list_pages(pool, forest)
        self._recorder = recorder
        self._device = pages.near.keys.device
        self._done: list[torch.cuda.Event | None] = []

    def __enter__(self) -> Pieces:
        near = self._near
        n_near = near.sink_keys.shape[1] + near.window_keys.shape[1]
        n_far = 0 if self._listed is None else self._listed.n_tokens
        widths = near.sink_keys.shape[-1], near.sink_values.shape[-1]
        n_heads, dtype = near.sink_keys.shape[0], near.sink_keys.dtype
        most = max(PIECE_BYTES // (n_heads * sum(widths) * dtype.itemsize), 16)
        self._cuts = piece_cuts(n_far, most)
        # Near tokens are part of the first piece: one pass over the queries less.
        sizes = [stop - start for start, stop in self._cuts] or [0]
        sizes[0] += n_near
        self._n_near, self._sizes = n_near, sizes if sizes[0] else []
        room = max(self._sizes, default=0)
        self._room = [
            [torch.empty(n_heads, room, w, dtype=dtype, device=self._device) for w in widths] for _ in self._sizes[:2]
        ]
        if self._listed is not None:
            self._upload(self._listed, n_heads, widths)
        for i in range(len(self._room)):
            self._bring(i)
        return self

    def _upload(self, listed: Listed, n_heads: int, widths: tuple[int, int]) -> None:
        near, pages = self._near, self._pages
        spans = [listed.spans(start, stop, n_heads) for start, stop in self._cuts]
        per_head = (listed.starts % listed.n_tokens).astype(np.int32)
        self._strides = page_strides(pages.place, *widths, pages.shelf.n_places)
        with self._reader.beside(self._device):
            self._words = _sent(listed.words, self._device)
            self._starts = _sent(per_head, self._device)
            self._spans = _sent(np.stack(spans), self._device)
        self._recorder.pages_read += len(listed.words)
        row_bytes = sum(widths) * near.sink_keys.dtype.itemsize
        self._recorder.bytes_to_device += listed.n_tokens * n_heads * row_bytes

    def _bring(self, i: int) -> None:
        """Start to fill piece `i`; its room was read by what the current stream holds so far."""
        from icecache.kernels.page_gather import page_gather

        keys, values = (t[:, : self._sizes[i]] for t in self._room[i % 2])
        with self._reader.beside(self._device) as event:
            skip = 0
            if i == 0 and self._n_near:
                near, skip = self._near, self._n_near
                torch.cat([near.sink_keys, near.window_keys], 1, out=keys[:, :skip])
                torch.cat([near.sink_values, near.window_values], 1, out=values[:, :skip])
            if self._cuts:
                first, _ = self._cuts[i]
                where = self._words, self._starts, self._spans[i]
                page_gather(*where, keys[:, skip:], values[:, skip:], first, page_strides=self._strides)
        self._done.append(event)

    def __iter__(self) -> Iterator[Pair]:
        for i, n in enumerate(self._sizes):
            if (event := self._done[i]) is not None:
                torch.cuda.current_stream(self._device).wait_event(event)
            keys, values = (t[:, :n] for t in self._room[i % 2])
            yield keys, values
            if i + 2 < len(self._sizes):
                self._bring(i + 2)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        last = self._done[-1] if self._done else None
        if last is not None:
            # Room that is freed now is used again in the order of the current stream, in which it was taken.
            torch.cuda.current_stream(self._device).wait_event(last)
            if self._listed is not None:
                self._reader.hold(last, self._listed.held)


@dataclass(eq=False, slots=True)
class PageReader:
    """Streams of one runtime, and the pages that they read."""

    _streams: dict[torch.device, torch.cuda.Stream] = field(default_factory=dict)
    _held: list[tuple[torch.cuda.Event, _core.Mirror]] = field(default_factory=list)

    def open(self, pages: LayerPages, row: int, pool: _core.Pool, recorder: Recorder) -> Pieces:
        """Begin to read all tokens of a row; `pages` must lie in memory that the device reads."""
        return Pieces(self, pages, row, pool, recorder)

    @contextlib.contextmanager
    def beside(self, device: torch.device) -> Iterator[torch.cuda.Event | None]:
        """Enqueue what is inside on a stream of its own, behind what the current stream holds.

        Yields
        ------
        event or None
            It comes behind what was enqueued inside; None: nobody has to wait.
        """
        if device.type != "cuda":
            yield None
            return
        if device not in self._streams:
            # Before the kernels of the model, which leave no processor free while they run.
            self._streams[device] = torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        stream = self._streams[device]
        stream.wait_stream(torch.cuda.current_stream(device))
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(stream):
            try:
                yield event
            finally:
                event.record(stream)

    def hold(self, event: torch.cuda.Event, mirror: _core.Mirror) -> None:
        """Keep pages as they are until `event`."""
        self._held = [(e, m) for e, m in self._held if not e.query()]  # type: ignore[no-untyped-call]
        self._held.append((event, mirror))

    def settle(self) -> None:
        """Let go of all pages; they are read no more."""
        for event, _ in self._held:
            event.synchronize()  # sync: a step ends, which has read them long ago
        self._held.clear()


@contextlib.contextmanager
def read_blocks(pages: LayerPages, row: int, recorder: Recorder) -> Iterator[Iterator[Pair]]:
    """Read all tokens of a row in blocks, one after the other, where no kernel reads the pages.

    Yields
    ------
    iterator of (torch.Tensor, torch.Tensor)
        Keys and values ``[H, n, D]`` on the device of the sink and the window.
    """
    yield _blocks(pages, row, recorder)


def _blocks(pages: LayerPages, row: int, recorder: Recorder) -> Iterator[Pair]:
    near = pages.near.row(row)
    keys, values = (
        torch.cat(t, 1) for t in ((near.sink_keys, near.window_keys), (near.sink_values, near.window_values))
    )
    if keys.shape[1]:
        yield keys, values
    forest = pages.forests[row] if pages.forests else None
    if forest is None:
        return
    recorder.pages_read += sum(forest.n_pages())
    for start in range(0, len(forest), BLOCK_TOKENS):
        with recorder.part("transfer"):
            stop = min(start + BLOCK_TOKENS, len(forest))
            block = read_back(forest, start, stop, keys, values, pages.place)
        recorder.bytes_to_device += block[0].nbytes + block[1].nbytes
        yield block


def _sent(array: npt.NDArray[np.generic], device: torch.device) -> torch.Tensor:
    """Copy to the device on the current stream; nobody waits."""
    host = torch.from_numpy(array)
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host
