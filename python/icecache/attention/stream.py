"""Exact attention of a later chunk over a context that lies in host pages, block by block, never materialised whole.

Dimension key: B rows, H KV heads, G query heads per KV head, Q queries, D head dim.
"""

from __future__ import annotations

import functools

import torch

from icecache import _core
from icecache.attention.chunk import chunk_attention
from icecache.attention.inside import Inside
from icecache.attention.partial import Partial, merge, partial_attention, with_sink_logits
from icecache.pages import LayerPages
from icecache.select import Services

BLOCK_PAGES = 256
"""Pages per head brought to the device at once: 4096 tokens, 16 MiB for 8 heads of 128 in bfloat16."""
LOGIT_BYTES = 64 << 20
"""Upper bound of one block of float32 logits; queries are cut into pieces to keep it."""


def stream_attention(
    services: Services,
    pages: LayerPages,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    inside: Inside,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend with a chunk of new tokens to everything before it, and to the chunk itself.

    On a GPU that can read the pages they come in pieces (`chunk`); elsewhere in blocks through staging memory.

    Parameters
    ----------
    pages : LayerPages
        The context; must not hold the chunk yet.
    query : torch.Tensor
        (B, H * G, Q, D), post-RoPE.
    keys, values : torch.Tensor
        (B, H, C, D): the chunk's own, C >= Q.
    inside : Inside
        Causality and padding inside the chunk.

    Returns
    -------
    torch.Tensor
        (B, Q, H * G, Dv) in the query's dtype.
    """
    if services.reads_pages(pages):
        past = functools.partial(services.reader.open, pages, pool=services.pool, recorder=services.recorder)
        with services.recorder.part("attention"):
            return chunk_attention(past, query, keys, values, inside, scaling=scaling, softcap=softcap, sinks=sinks)
    grouped = by_kv_head(query, keys.shape[1])
    chunk_mask = inside.mask(query.shape[2], keys.shape[2], query.device)
    near_keys, near_values, live = pages.near.view()
    near_mask = None if live is None else live[:, None, None, None, :]
    pieces = query_pieces(grouped, max(near_keys.shape[2], keys.shape[2], BLOCK_PAGES * 16))
    with services.recorder.part("attention"):
        parts = near_and_chunk(
            grouped, pieces, (near_keys, near_values), near_mask, (keys, values), chunk_mask, scaling, softcap
        )
    if pages.forests and any(len(forest) for forest in pages.forests):
        _merge_pages(services, pages, grouped, pieces, parts, scaling, softcap)
    return joined(parts, sinks, query.dtype)


def by_kv_head(query: torch.Tensor, n_heads: int) -> torch.Tensor:
    """View (B, H * G, Q, D) as (B, H, G, Q, D)."""
    return query.view(query.shape[0], n_heads, -1, query.shape[2], query.shape[-1])


def near_and_chunk(
    query: torch.Tensor,
    pieces: list[tuple[int, int]],
    near: tuple[torch.Tensor, torch.Tensor],
    near_mask: torch.Tensor | None,
    chunk: tuple[torch.Tensor, torch.Tensor],
    chunk_mask: torch.Tensor,
    scaling: float,
    softcap: float | None,
) -> list[Partial]:
    """Attend with each piece of the queries to what lies on the device and to the chunk itself.

    Parameters
    ----------
    query : torch.Tensor
        (B, H, G, Q, D).
    pieces : list of (int, int)
        Of :func:`query_pieces`.
    near, chunk : tuple of torch.Tensor
        Keys and values (B, H, N, D) and (B, H, N, Dv).
    near_mask : torch.Tensor or None
        Bool, broadcastable to (B, H, G, Q, N).
    chunk_mask : torch.Tensor
        Bool, broadcastable to (B, Q, C).
    """
    # Once, not in every piece; no copy in float32.
    near_keys, near_values, keys, values = (t.float() for t in (*near, *chunk))
    own = chunk_mask.expand(query.shape[0], -1, -1)[:, None, None]
    parts = []
    for start, stop in pieces:
        piece = query[:, :, :, start:stop]
        past = partial_attention(piece, near_keys, near_values, scaling=scaling, mask=near_mask, softcap=softcap)
        new = partial_attention(piece, keys, values, scaling=scaling, mask=own[:, :, :, start:stop], softcap=softcap)
        parts.append(merge([past, new]))
    return parts


def joined(parts: list[Partial], sinks: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """Put the pieces of the queries together: (B, Q, H * G, Dv), as a model takes it."""
    if sinks is not None:
        parts = [with_sink_logits(part, sinks) for part in parts]
    out = torch.cat([part.out for part in parts], dim=3)
    n_rows, n_queries, dim = out.shape[0], out.shape[3], out.shape[4]
    out = out.permute(0, 3, 1, 2, 4).reshape(n_rows, n_queries, -1, dim)
    return out.to(dtype).contiguous()  # some models call view() on it


def query_pieces(query: torch.Tensor, n_keys: int) -> list[tuple[int, int]]:
    """Cut the Q axis so that one block of logits stays below `LOGIT_BYTES`."""
    n_rows, n_heads, group, n_queries, _ = query.shape
    size = max(1, LOGIT_BYTES // (4 * n_rows * n_heads * group * n_keys))
    return [(start, min(start + size, n_queries)) for start in range(0, n_queries, size)]


def _merge_pages(
    services: Services,
    pages: LayerPages,
    query: torch.Tensor,
    pieces: list[tuple[int, int]],
    parts: list[Partial],
    scaling: float,
    softcap: float | None,
) -> None:
    """Fold every host page into `parts`, in place."""
    near = pages.near
    pages.shelf.check_even()
    everything = _core.all_pages(pages.forests)
    n_pages = everything.pages.shape[2]
    shape = (near.keys.shape[-1], near.values.shape[-1], near.keys.dtype, near.keys.device)
    for first in range(0, n_pages, BLOCK_PAGES):
        last = min(first + BLOCK_PAGES, n_pages)
        fetched = services.staging.fetch(
            services.pool, services.recorder, everything, first, last, *shape, place=pages.place
        )
        mask = None if fetched.mask is None else fetched.mask[:, :, None, None, :]
        with services.recorder.part("attention"):
            keys, values = fetched.keys.float(), fetched.values.float()
            for i, (start, stop) in enumerate(pieces):
                piece = query[:, :, :, start:stop]
                far = partial_attention(piece, keys, values, scaling=scaling, mask=mask, softcap=softcap)
                parts[i] = merge([parts[i], far])
