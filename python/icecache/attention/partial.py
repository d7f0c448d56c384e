"""Softmax attention over one part of the keys, and the merge of parts.

Dimension key: B rows, H KV heads, G query heads per KV head, Q queries, N keys, D head dim.

``lse = log sum_n exp(logit_n)`` and ``out = sum_n exp(logit_n - lse) v_n``. Two disjoint parts (a, b) merge to
``lse = logaddexp(a.lse, b.lse)`` and ``out = exp(a.lse - lse) a.out + exp(b.lse - lse) b.out``. A part without live
keys has ``lse = -inf`` and ``out = 0`` and leaves the other part as it is. Everything is float32.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Partial:
    """Attention over a part: `out` float32 (B, H, G, Q, Dv), `lse` float32 (B, H, G, Q), natural logarithm."""

    out: torch.Tensor
    lse: torch.Tensor


def partial_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    scaling: float,
    mask: torch.Tensor | None = None,
    softcap: float | None = None,
) -> Partial:
    """Attend to one part of the keys.

    Parameters
    ----------
    query : torch.Tensor
        (B, H, G, Q, D), any float dtype.
    keys, values : torch.Tensor
        (B, H, N, D) and (B, H, N, Dv).
    scaling : float
        Factor of the logits.
    mask : torch.Tensor or None
        Bool, broadcastable to (B, H, G, Q, N); False: not attended.
    softcap : float or None
        ``softcap * tanh(logit / softcap)`` is applied to the scaled logits.
    """
    n_rows, n_heads, group, n_queries, dim = query.shape
    folded = (query.float() * scaling).reshape(n_rows, n_heads, group * n_queries, dim)
    logits = torch.matmul(folded, keys.float().transpose(-1, -2))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is not None:
        grouped = logits.view(n_rows, n_heads, group, n_queries, -1)
        logits = grouped.masked_fill(~mask, float("-inf")).view_as(logits)
    lse = torch.logsumexp(logits, dim=-1, keepdim=True)
    # Where no key is live, -inf - -inf would be NaN; without a mask that is so only where there is no key at all.
    shift = lse if mask is None else torch.where(lse == float("-inf"), 0.0, lse)
    out = torch.matmul(torch.exp(logits - shift), values.float())
    shape = (n_rows, n_heads, group, n_queries)
    return Partial(out.view(*shape, values.shape[-1]), lse.view(shape))


def merge(parts: Sequence[Partial]) -> Partial:
    """Attention over the union of disjoint parts."""
    if len(parts) == 1:
        return parts[0]
    lse = functools.reduce(torch.logaddexp, (part.lse for part in parts))
    safe = torch.where(lse == float("-inf"), 0.0, lse)
    out = sum(torch.exp(part.lse - safe)[..., None] * part.out for part in parts)
    assert isinstance(out, torch.Tensor)
    return Partial(out, lse)


def with_sink_logits(part: Partial, sinks: torch.Tensor) -> Partial:
    """Add one learned logit per query head that takes softmax mass and gives no value (gpt-oss ``s_aux``).

    Parameters
    ----------
    sinks : torch.Tensor
        (H * G,), any float dtype.
    """
    logits = sinks.float().view(1, part.lse.shape[1], part.lse.shape[2], 1)
    lse = torch.logaddexp(part.lse, logits)
    return Partial(part.out * torch.exp(part.lse - lse)[..., None], lse)
