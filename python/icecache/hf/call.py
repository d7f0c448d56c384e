"""One call of the attention function, as the cache layers see it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

Pair = tuple[torch.Tensor, torch.Tensor]


class DenseAttention(Protocol):
    """The model's own attention on the keys and values at hand."""

    def __call__(self) -> torch.Tensor:
        """Attention output (B, Q, n_q_heads, Dv)."""
        ...


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the attention function for one of our layers.

    Parameters
    ----------
    query : torch.Tensor
        (B, n_q_heads, Q, D), post-RoPE.
    keys, values : torch.Tensor
        (B, n_kv_heads, C, D): the very tensors that `update` returned.
    mask : torch.Tensor or None
        None or 2D in a paged step, the model's own kind otherwise.
    shared : bool
        Another layer's keys are attended (cross-layer KV sharing): nothing may be committed.
    """

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    mask: torch.Tensor | None
    scaling: float
    softcap: float | None
    sinks: torch.Tensor | None
    dense: DenseAttention
    shared: bool
