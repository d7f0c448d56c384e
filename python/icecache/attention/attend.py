"""Attention of many queries to one part of the keys, by the fastest kernel there is, folded into earlier parts.

Dimension key: H KV heads, G query heads per KV head, Q queries, N keys, D head dim.

On a GPU our kernel (:mod:`icecache.kernels.part_attention`) serves everything, and cuDNN long parts of a length that is
worth a plan. On a CPU torch's fused kernel does, where it can: 4.5 times as fast as products whose logits are written
out (512 queries of 32 heads of 128, 4096 keys, float32). What neither can do is written out, some queries at a time.
"""

from __future__ import annotations

import torch

from icecache.attention.inside import causal as causal_mask
from icecache.attention.library import library_attention, serves
from icecache.attention.partial import Partial, merge, partial_attention

Pair = tuple[torch.Tensor, torch.Tensor]

LOGIT_BYTES = 64 << 20
"""Upper bound of one block of float32 logits."""


def query_pieces(query: torch.Tensor, n_keys: int) -> list[tuple[int, int]]:
    """Cut the Q axis of (B, H, G, Q, D) so that one block of logits stays below `LOGIT_BYTES`."""
    n_rows, n_heads, group, n_queries, _ = query.shape
    size = max(1, LOGIT_BYTES // (4 * n_rows * n_heads * group * n_keys))
    return [(start, min(start + size, n_queries)) for start in range(0, n_queries, size)]


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    causal: bool = False,
    onto: Pair | None = None,
    planned: bool = False,
) -> Pair:
    """Attend to one part.

    Parameters
    ----------
    query : torch.Tensor
        (H, G, Q, D).
    keys, values : torch.Tensor
        (H, N, D) and (H, N, Dv), N >= 1.
    causal : bool, default=False
        Whether the queries are the last Q of the N tokens and see none behind themselves.
    onto : tuple of torch.Tensor or None
        What earlier parts gave; not to be used any more afterwards.
    planned : bool, default=False
        Whether parts of this length come often, so that a library may plan for it.

    Returns
    -------
    torch.Tensor, torch.Tensor
        Output float32 (H, G, Q, Dv) and log-sum-exp float32 (H, G, Q), natural logarithm.
    """
    if query.is_cuda and torch.version.hip is None:
        from icecache.kernels.fold_part import fold_part
        from icecache.kernels.part_attention import part_attention

        if planned and onto is not None and not causal and serves(query, values, softcap):
            fold_part(*library_attention(query, keys, values, scaling), *onto)
            return onto
        return part_attention(query, keys, values, scaling, softcap=softcap, causal=causal, onto=onto)
    n_queries, n_keys = query.shape[2], keys.shape[1]
    square = query.shape[3] == values.shape[2] and (n_queries == n_keys or not causal)
    if query.device.type == "cpu" and softcap is None and square:
        part = _fused(query, keys, values, scaling, causal)
    else:
        mask = causal_mask(n_queries, n_keys, query.device)[0] if causal else None
        part = masked(query, keys, values, mask, scaling=scaling, softcap=softcap)
    if onto is None:
        return part
    both = merge([Partial(*onto), Partial(*part)])
    return both.out, both.lse


def _fused(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float, causal: bool) -> Pair:
    n_heads, group, _, dim = query.shape
    wide = [t[:, None].expand(n_heads, group, -1, dim) for t in (keys, values)]  # views: heads of a group share them
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, *wide, 0.0, causal, scale=scaling)
    return out.float(), lse.float()


def masked(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scaling: float,
    softcap: float | None = None,
) -> Pair:
    """Attend under any bool mask (Q, N), logits written out; None: every query sees every key."""
    batch, keys, values = query[None], keys[None].float(), values[None].float()  # once, not in every piece
    parts = []
    for start, stop in query_pieces(batch, keys.shape[2]):
        seen = None if mask is None else mask[start:stop]
        piece = batch[:, :, :, start:stop]
        parts.append(partial_attention(piece, keys, values, scaling=scaling, mask=seen, softcap=softcap))
    return torch.cat([p.out[0] for p in parts], 2), torch.cat([p.lse[0] for p in parts], 2)
