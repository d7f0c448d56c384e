"""Later chunks of a prompt leave the device as prompts do: while the next layers are computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from icecache.config import PAGE_TOKENS
from icecache.pages.near import NearBuffer, NearRow
from icecache.pages.offload import Departure, Offload
from icecache.stats import Recorder

if TYPE_CHECKING:
    from icecache.pages.layer import LayerPages


@dataclass(frozen=True, slots=True)
class Before:
    """What a layer was before a chunk, should its tokens not arrive."""

    near: NearBuffer
    n_positions: int
    lengths: list[int]
    """Tokens of each forest."""

    def restore(self, pages: LayerPages) -> None:
        """Undo the chunk; rows that did arrive are cut."""
        pages.near = self.near
        pages.padding.crop(pages.padding.n_positions - self.n_positions)
        for forest, n in zip(pages.forests, self.lengths, strict=True):
            if len(forest) > n:
                forest.crop(n)
        pages.shelf.changes += 1


def send_chunk(
    pages: LayerPages,
    keys: torch.Tensor,
    values: torch.Tensor,
    valid: torch.Tensor | None,
    offload: Offload,
    recorder: Recorder,
) -> None:
    """Add a chunk ``[B, H, n, D]`` of a layer that shares no pages; only the newest tokens stay near.

    The same tokens enter the forests, in one insert, as if the chunk had been appended and the window drained.
    Call `settle` on the pages before anything else; if the tokens did not arrive it undoes the chunk.
    """
    from icecache.pages.layer import valid_tokens

    layout, rows, leaving = pages.layout, [], []
    for b in range(pages.n_rows):
        new = valid_tokens(keys[b], valid, b), valid_tokens(values[b], valid, b)
        row = pages.near.row(b).extended(*new, layout.sink_tokens)
        n = max(row.window_keys.shape[1] - layout.window_tokens, 0) // PAGE_TOKENS * PAGE_TOKENS
        rows.append(NearRow(row.sink_keys, row.sink_values, row.window_keys[:, n:], row.window_values[:, n:]))
        if n:
            pair = row.window_keys[:, :n], row.window_values[:, :n]
            leaving.append(Departure((pages.layer,), b, pages.forests[b], (pair,)))
    before = Before(pages.near, pages.padding.n_positions, [len(forest) for forest in pages.forests])
    near = NearBuffer(rows, layout.sink_tokens)
    job = offload.submit(recorder, leaving) if leaving else None
    # Nothing below fails. What was handed over is among the tokens that leave.
    pages.handed = [None] * pages.n_rows
    pages.near = near
    pages.padding.append(keys.shape[2], valid)
    pages.shelf.changes += 1
    if job is not None:
        pages.await_job(job, before)
