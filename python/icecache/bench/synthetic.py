"""Caches filled with made-up keys and values: decoding can be timed at any length without computing the prompt.

The keys form clusters (64 directions a head plus noise, as keys of real models do coarsely), so that packing and
search do the work they would do; how long either takes depends on the sizes and hardly on the values.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache

from icecache.hf.cache import RetrievalLayer

_CLUSTERS = 64


@dataclass(frozen=True, slots=True)
class Content:
    """Shape and seed of made-up keys and values."""

    n_layers: int
    n_rows: int
    n_kv_heads: int
    n_tokens: int
    head_dim: int
    dtype: torch.dtype
    device: torch.device
    seed: int

    def layers(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values ``(B, H, n, D)`` of one layer after the other; the same ones for the same seed."""
        generator = torch.Generator(self.device).manual_seed(self.seed)
        shape = (self.n_rows, self.n_kv_heads, self.n_tokens, self.head_dim)
        for _ in range(self.n_layers):
            centres = torch.randn(
                self.n_kv_heads * _CLUSTERS, self.head_dim, generator=generator, device=self.device
            ).to(self.dtype)
            picks = torch.randint(_CLUSTERS, shape[:3], generator=generator, device=self.device)
            picks += torch.arange(self.n_kv_heads, device=self.device)[None, :, None] * _CLUSTERS
            keys = torch.empty(shape, dtype=self.dtype, device=self.device).normal_(0, 0.5, generator=generator)
            keys += centres[picks]
            yield keys, torch.empty(shape, dtype=self.dtype, device=self.device).normal_(0, 1, generator=generator)


def fill(cache: Cache, content: Content) -> None:
    """Fill an empty cache: one of ours through packing and inserting, another through its own ``update``."""
    for index, (keys, values) in enumerate(content.layers()):
        layer = cache.layers[index] if index < len(cache.layers) else None
        if isinstance(layer, RetrievalLayer):
            layer.load(keys, values, None)
        else:
            cache.update(keys, values, index)
