"""Later chunks of a prompt leave the device as prompts do: while the next layers are computed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from icecache.config import PAGE_TOKENS
from icecache.pages.near import NearBuffer, NearRow
from icecache.pages.offload import Departure, Offload
from icecache.pages.shelf import Pair
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
    group: Sequence[LayerPages],
    chunks: Sequence[Pair],
    valid: torch.Tensor | None,
    offload: Offload,
    recorder: Recorder,
) -> None:
    """Add a chunk to layers that share pages, usually one; only the newest tokens stay near.

    The same tokens enter the forests, in one insert, as if the chunk had been appended and the windows drained.
    Call `settle` on the pages before anything else; if the tokens did not arrive it undoes the chunk.

    Parameters
    ----------
    group : sequence of LayerPages
        All layers of a shelf, the leader first.
    chunks : sequence of (torch.Tensor, torch.Tensor)
        Keys and values ``[B, H, n, D]`` of each.
    valid : torch.Tensor or None
        Bool (B, n) on the CPU; False: padding. None: no padding.
    """
    from icecache.pages.layer import valid_tokens

    leader, layout = group[0], group[0].layout
    near: list[list[NearRow]] = [[] for _ in group]
    leaving = []
    for b in range(leader.n_rows):
        rows = [
            pages.near.row(b).extended(valid_tokens(k[b], valid, b), valid_tokens(v[b], valid, b), layout.sink_tokens)
            for pages, (k, v) in zip(group, chunks, strict=True)
        ]
        n = max(rows[0].window_keys.shape[1] - layout.window_tokens, 0) // PAGE_TOKENS * PAGE_TOKENS
        for of_layer, row in zip(near, rows, strict=True):
            kept = row.window_keys[:, n:], row.window_values[:, n:]
            of_layer.append(NearRow(row.sink_keys, row.sink_values, *kept))
        if n:
            pairs = tuple((row.window_keys[:, :n], row.window_values[:, :n]) for row in rows)
            leaving.append(Departure(tuple(pages.layer for pages in group), b, leader.forests[b], pairs))
    lengths = [len(forest) for forest in leader.forests]
    befores = [Before(pages.near, pages.padding.n_positions, lengths) for pages in group]
    buffers = [NearBuffer(rows, layout.sink_tokens) for rows in near]
    job = offload.submit(recorder, leaving) if leaving else None
    # Nothing below fails. What was handed over is among the tokens that leave.
    leader.shelf.changes += 1
    for pages, buffer, before in zip(group, buffers, befores, strict=True):
        pages.handed = [None] * pages.n_rows
        pages.near = buffer
        pages.padding.append(chunks[0][0].shape[2], valid)
        if job is not None:
            pages.await_job(job, before)
