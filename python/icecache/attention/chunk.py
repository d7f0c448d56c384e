"""Exact attention of a later chunk: to itself, and to a past that arrives in pieces; merged by log-sum-exp.

Dimension key: B rows, H KV heads, G query heads per KV head, Q queries, C tokens of the chunk, D head dim.

Padding is left out, so that what remains of a row is plain: a chunk under a causal mask, and a past that is seen whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext

import torch

from icecache.attention.attend import Pair, attend, masked
from icecache.attention.inside import Inside
from icecache.attention.partial import Partial, with_sink_logits

Past = Callable[[int], AbstractContextManager[Iterable[Pair]]]
"""Of a row: keys and values ``[H, n, D]`` of all tokens before the chunk, in any order; on their way from entry on."""


def chunk_attention(
    past: Past,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    inside: Inside,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend with a chunk of new tokens to everything before it, and to itself.

    Parameters
    ----------
    query : torch.Tensor
        (B, H * G, Q, D), post-RoPE: of the last Q tokens of the chunk.
    keys, values : torch.Tensor
        (B, H, C, D): the chunk's own, C >= Q.
    sinks : torch.Tensor or None
        (H * G,), extra logits.

    Returns
    -------
    torch.Tensor
        (B, Q, H * G, Dv) in the query's dtype; 0 for padding.
    """
    n_rows, n_heads, n_new = keys.shape[:3]
    n_queries, value_dim = query.shape[2], values.shape[3]
    grouped = query.view(n_rows, n_heads, -1, n_queries, query.shape[3])
    out = query.new_zeros(n_rows, n_queries, n_heads, grouped.shape[2], value_dim)
    for b in range(n_rows):
        q, own, special, places = grouped[b], (keys[b], values[b]), None, None
        if inside.special is not None:
            special = inside.special[b if len(inside.special) > 1 else 0]
        elif inside.valid is not None and not bool(inside.valid[b].all()):
            tokens = inside.valid[b].nonzero().flatten()
            places = (tokens[tokens >= n_new - n_queries] - (n_new - n_queries)).to(keys.device)
            if not len(places):
                continue
            tokens = tokens.to(keys.device)
            q, own = q.index_select(2, places), (keys[b].index_select(1, tokens), values[b].index_select(1, tokens))
        with torch.cuda.device(q.device) if q.is_cuda else nullcontext():  # kernels run on the current one
            part = _row(past(b), q, own, special, scaling, softcap)
        if sinks is not None:
            part = with_sink_logits(part, sinks)
        found = part.out[0].permute(2, 0, 1, 3)
        if places is None:
            out[b] = found
        else:
            out[b].index_copy_(0, places, found.to(out.dtype))
    return out.flatten(2, 3)


def _row(
    past: AbstractContextManager[Iterable[Pair]],
    query: torch.Tensor,
    own: Pair,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
) -> Partial:
    """Attend with one row (H, G, Q, D); the result has an axis of length 1 for it."""
    with past as pieces:  # on their way while the chunk attends to itself
        if mask is None:
            part = attend(query, *own, scaling=scaling, softcap=softcap, causal=True)
        else:
            part = masked(query, *own, mask, scaling=scaling, softcap=softcap)
        before = 0
        for keys, values in pieces:
            again = keys.shape[1] == before
            part = attend(query, keys, values, scaling=scaling, softcap=softcap, onto=part, planned=again)
            before = keys.shape[1]
    return Partial(part[0][None], part[1][None])
