"""Exact attention of a later chunk over a context that lies in host pages, piece by piece, never materialised whole."""

from __future__ import annotations

import functools

import torch

from icecache.attention.chunk import Past, chunk_attention
from icecache.attention.inside import Inside
from icecache.pages import LayerPages
from icecache.select import Services
from icecache.transfer import read_blocks


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

    A GPU that can read the pages does so beside the computation; otherwise blocks are copied one after the other.

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
    pages.shelf.check_even()
    past: Past
    if services.reads_pages(pages):
        past = functools.partial(services.reader.open, pages, pool=services.pool, recorder=services.recorder)
    else:
        past = functools.partial(read_blocks, pages, recorder=services.recorder)
    with services.recorder.part("attention"):
        return chunk_attention(past, query, keys, values, inside, scaling=scaling, softcap=softcap, sinks=sinks)
