"""PQCache: product quantisation of the keys of the prompt, top-k tokens by looked-up scores.

Zhang et al., "PQCache: Product Quantization-based KVCache for Long Context LLM Inference" (arXiv 2407.12820); public
code HugoZHL/PQCache, ``pq_search.py`` and ``run_llama.sh``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from icecache.errors import ConfigError
from icecache.policies.kmeans import kmeans, nearest
from icecache.select import Baseline, Chosen, Prompt, StepView, best, group_weight


@dataclass(frozen=True, slots=True)
class PQCache(Baseline):
    """Sink, window, and the best tokens per KV head by approximate logits.

    Once, after the prefill: k-means (Euclidean) per KV head and part of the head dim over all prompt tokens after the
    sink. At a step: table look-ups give approximate logits; their softmax per query head, summed over the query
    group, picks the tokens. A token that leaves the window gets the nearest *old* centroid.

    Parameters
    ----------
    budget : int
        Tokens per KV head, sink and window included, the newest token not. What the sink leaves is split in halves, as
        published: recent tokens and retrieved ones.
    sink : int or None, default=None
        32 published; None: 32, but at most a quarter of the budget.
    parts : int, default=2
        Parts of the head dim ("m").
    bits : int, default=6
        ``2 ** bits`` centroids per part.
    iterations : int, default=20
        Of k-means. The published number adapts to the time at hand.
    seed : int, default=0
        Of the first centroids.

    Raises
    ------
    ConfigError
        If a value is out of range.
    """

    budget: int
    sink: int | None = None
    parts: int = 2
    bits: int = 6
    iterations: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        if self.sink is None:
            object.__setattr__(self, "sink", min(32, self.budget // 4))
        if not 0 <= self._n_sink <= self.budget - 2:
            msg = f"sink must leave two tokens of budget={self.budget}, got {self.sink!r}"
            raise ConfigError(msg)
        if self.parts < 1 or not 1 <= self.bits <= 12 or self.iterations < 1:
            msg = (
                "parts and iterations must be at least 1 and bits in 1..=12, got "
                f"{self.parts!r}, {self.iterations!r} and {self.bits!r}"
            )
            raise ConfigError(msg)

    @property
    def name(self) -> str:
        """``pqcache``."""
        return "pqcache"

    @property
    def _n_sink(self) -> int:
        assert self.sink is not None
        return self.sink

    @property
    def _window(self) -> int:
        return (self.budget - self._n_sink) // 2

    def prepare(self, prompt: Prompt) -> dict[str, torch.Tensor]:
        """``centroids``: float32 (B, H, m, K, D/m); ``codes``: int16 (B, H, m, tokens that every row has)."""
        points = self._split(prompt.keys)
        live = prompt.valid & (prompt.columns >= self._n_sink)
        shape = points.shape[:3]
        live = live[:, None, None].expand(*shape, -1).flatten(0, 2)
        centroids = kmeans(points.flatten(0, 2), live, 2**self.bits, self.iterations, self.seed)
        shortest = int(prompt.lengths.min())
        codes = nearest(points[..., :shortest, :].flatten(0, 2), centroids).to(torch.int16)
        return {"centroids": centroids.view(*shape, *centroids.shape[1:]), "codes": codes.view(*shape, shortest)}

    def choose(self, view: StepView) -> Chosen:
        """Attend to sink, window and the tokens of the largest approximate weights."""
        near = view.sink_and_window(self._n_sink, self._window)[:, None, None]
        others = view.valid[:, None, None] & ~near
        scores = group_weight(self._look_up(view).masked_fill(~others, float("-inf")))
        # Tokens with the same codes have equal scores.
        chosen = best(scores, others, self.budget - self._n_sink - self._window, first_wins=True)
        return Chosen(chosen | near)

    def _look_up(self, view: StepView) -> torch.Tensor:
        """Approximate logits (B, H, G, T)."""
        centroids, codes = view.state["centroids"], view.state["codes"].long()
        known = min(codes.shape[-1], view.keys.shape[2])
        later = self._split(view.keys[:, :, known:])
        shape = later.shape[:3]
        new = nearest(later.flatten(0, 2), centroids.flatten(0, 2)).view(*shape, -1)
        codes = torch.cat([codes[..., :known], new], -1)
        usable = centroids.masked_fill(centroids.isinf(), 0.0)
        queries = self._split(view.query)  # (B, H, m, G, D/m)
        table = queries @ usable.transpose(-1, -2) * view.scaling  # (B, H, m, G, K)
        index = codes[:, :, :, None].expand(*table.shape[:4], -1)
        return table.gather(-1, index).sum(2)

    def _split(self, vectors: torch.Tensor) -> torch.Tensor:
        """(B, H, n, D) in float32 as (B, H, m, n, D/m)."""
        if vectors.shape[-1] % self.parts:
            msg = f"parts must divide the head dim {vectors.shape[-1]}, got {self.parts}"
            raise ConfigError(msg)
        return vectors.float().reshape(*vectors.shape[:3], self.parts, -1).transpose(2, 3)
