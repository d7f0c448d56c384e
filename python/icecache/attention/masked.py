"""Attention under the mask of a policy, over keys and values that are all on the device.

Dimension key: B rows, H KV heads, G query heads per KV head, T columns, Q queries, C chunk, D head dim.
"""

from __future__ import annotations

import contextlib
import functools

import torch

from icecache.attention.attend import Pair
from icecache.attention.chunk import chunk_attention
from icecache.attention.inside import Inside
from icecache.attention.mass import add_mass
from icecache.pages import WholeKV
from icecache.select import Chosen, Services, StepView


def masked_attention(
    services: Services, chosen: Chosen, view: StepView, values: torch.Tensor, sinks: torch.Tensor | None = None
) -> torch.Tensor:
    """Attend with the newest token, and count what that costs.

    Parameters
    ----------
    chosen : Chosen
        What the policy chose for `view`.
    values : torch.Tensor
        (B, H, T, Dv).
    sinks : torch.Tensor or None
        (H * G,), extra logits that take mass and give no value.

    Returns
    -------
    torch.Tensor
        float32 (B, 1, H * G, Dv).
    """
    logits = view.logits
    mask = (chosen.mask & view.valid[:, None, None]).expand(logits.shape)
    weights = chosen.weights
    if weights is None:
        biased = logits if chosen.bias is None else logits + chosen.bias
        weights = _softmax(biased.masked_fill(~mask, float("-inf")), sinks)
    out = torch.matmul(weights, values.float())
    if not chosen.dense:
        services.charges.add(mask, view.generated())
        kept = torch.where(mask, _softmax(logits, sinks), 0.0).sum()
        add_mass(services, logits.device, kept, logits.shape[0] * logits.shape[1] * logits.shape[2])
    return out.reshape(out.shape[0], 1, -1, out.shape[-1])


def _softmax(logits: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """Softmax over the last axis, zero where nothing is live; `sinks` take their share."""
    lse = torch.logsumexp(logits, dim=-1, keepdim=True)
    if sinks is not None:
        lse = torch.logaddexp(lse, sinks.float().view(1, logits.shape[1], logits.shape[2], 1))
    return torch.exp(logits - torch.where(lse == float("-inf"), 0.0, lse))


def whole_attention(
    whole: WholeKV,
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

    Parameters
    ----------
    whole : WholeKV
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
    past = functools.partial(_row_of, whole)
    return chunk_attention(past, query, keys, values, inside, scaling=scaling, softcap=softcap, sinks=sinks)


def _row_of(whole: WholeKV, row: int) -> contextlib.nullcontext[list[Pair]]:
    """All of a row, in one piece."""
    n = whole.length(row)
    return contextlib.nullcontext([(whole.keys[row, :, :n], whole.values[row, :, :n])] if n else [])
