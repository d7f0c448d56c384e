"""What the tokens of a later chunk see of the chunk itself.

Dimension key: B rows, Q queries, C tokens of the chunk.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Inside:
    """Mask of a later chunk against itself.

    Parameters
    ----------
    valid : torch.Tensor or None
        Bool (B, C) on the CPU: which new positions are tokens and no padding; None: all.
    special : torch.Tensor or None
        Bool, broadcastable to (B, Q, C), on the compute device, where the mask is not plain causality and padding.
    """

    valid: torch.Tensor | None = None
    special: torch.Tensor | None = None


def causal(n_queries: int, n_keys: int, device: torch.device) -> torch.Tensor:
    """Bool (1, Q, C): the queries are the last ones."""
    return torch.ones(n_queries, n_keys, dtype=torch.bool, device=device).tril(n_keys - n_queries)[None]
