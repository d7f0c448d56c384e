"""k-means over many small sets at once, seeded.

Dimension key: N sets, T points of a set (some may be masked), K clusters, D dims.
"""

from __future__ import annotations

import torch

_LIMIT = 1 << 27
"""Distances held at once."""


def kmeans(points: torch.Tensor, live: torch.Tensor, n_clusters: int, n_iterations: int, seed: int) -> torch.Tensor:
    """Lloyd's algorithm from `n_clusters` random live points; an empty cluster keeps its centroid.

    Parameters
    ----------
    points : torch.Tensor
        float32 (N, T, D).
    live : torch.Tensor
        Bool (N, T).
    n_clusters : int
        A set with fewer live points leaves the other centroids at infinity: nothing is ever nearest to them.

    Returns
    -------
    torch.Tensor
        float32 (N, K, D).
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(points.shape[1], generator=generator).to(points.device)  # the same draw for every set
    drawn = order.masked_fill(~live, -1.0).topk(min(n_clusters, points.shape[1]), dim=1)
    centroids = points.gather(1, drawn.indices[..., None].expand(-1, -1, points.shape[2]))
    centroids = centroids.masked_fill((drawn.values < 0)[..., None], float("inf"))
    missing = n_clusters - centroids.shape[1]
    if missing:
        centroids = torch.nn.functional.pad(centroids, (0, 0, 0, missing), value=float("inf"))
    rows = max(1, _LIMIT // (points.shape[1] * n_clusters))
    parts = []
    for first in range(0, len(points), rows):
        part = slice(first, first + rows)
        parts.append(_lloyd(points[part], live[part], centroids[part], n_iterations))
    return torch.cat(parts)


def nearest(points: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Index of the nearest centroid (N, K, D) of each point (N, T, D): int64 (N, T)."""
    usable = centroids.isfinite().all(-1)
    safe = centroids.masked_fill(~usable[..., None], 0.0)
    squares = (safe * safe).sum(-1).masked_fill(~usable, float("inf"))
    rows = max(1, _LIMIT // max(1, points.shape[1] * centroids.shape[1]))
    return torch.cat(
        [
            (squares[i : i + rows, None] - 2 * points[i : i + rows] @ safe[i : i + rows].transpose(-1, -2)).argmin(-1)
            for i in range(0, len(points), rows)
        ]
    )


def _lloyd(points: torch.Tensor, live: torch.Tensor, centroids: torch.Tensor, n_iterations: int) -> torch.Tensor:
    clusters = torch.arange(centroids.shape[1], device=points.device)
    for _ in range(n_iterations):
        codes = nearest(points, centroids)
        member = ((codes[:, None] == clusters[:, None]) & live[:, None]).float()  # (N, K, T)
        counts = member.sum(-1, keepdim=True)
        centroids = torch.where(counts > 0, member @ points / counts.clamp(min=1), centroids)
    return centroids
