"""Exact neighbours in float32, and how many of them an answer holds."""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Metric = Literal["ip", "l2", "cosine"]
Floats = NDArray[np.float32]
Ids = NDArray[np.int64]

DEPTH = 100  # neighbours kept per query
_BLOCK = 32  # queries scored at once: at 307,200 vectors 39 MB
_TIE = 1e-5  # relative; float32 sums of a few hundred products differ by less, in whatever order they are added


def scores(queries: Floats, vectors: Floats, metric: Metric) -> Floats:
    """Similarity of every pair, larger = closer: ``q . x``, ``-|q - x|^2`` or cosine; ``(n_queries, n)``."""
    dots: Floats = queries @ vectors.T
    if metric == "ip":
        return dots
    squares = np.einsum("nd,nd->n", vectors, vectors)
    if metric == "l2":
        return np.asarray(2 * dots - squares - np.einsum("nd,nd->n", queries, queries)[:, None], np.float32)
    norms = np.sqrt(squares) * np.linalg.norm(queries, axis=1)[:, None]
    return np.asarray(dots / np.maximum(norms, np.float32(1e-30)), np.float32)


def exact(queries: Floats, vectors: Floats, metric: Metric, k: int = DEPTH) -> tuple[Ids, Floats]:
    """Row numbers and scores of the `k` nearest vectors of each query, nearest first; ``(n_queries, min(k, n))``."""
    k = min(k, len(vectors))
    ids = np.empty((len(queries), k), np.int64)
    best = np.empty((len(queries), k), np.float32)
    for start in range(0, len(queries), _BLOCK):
        table = scores(queries[start : start + _BLOCK], vectors, metric)
        part = np.argpartition(table, -k, axis=1)[:, -k:]
        value = np.take_along_axis(table, part, axis=1)
        order = np.argsort(-value, axis=1, kind="stable")
        ids[start : start + _BLOCK] = np.take_along_axis(part, order, axis=1)
        best[start : start + _BLOCK] = np.take_along_axis(value, order, axis=1)
    return ids, best


def recall(found: Ids, truth: tuple[Ids, Floats], queries: Floats, vectors: Floats, metric: Metric) -> float:
    """Share of the true neighbours that an answer ``(n_queries, k)`` holds.

    An id counts once, and also when it is not in the truth but as near as the k-th true neighbour (a tie). Ids that are
    negative or past the last vector count as misses.
    """
    k = found.shape[1]
    hits = 0
    for answer, near, score, query in zip(found, truth[0][:, :k], truth[1][:, :k], queries, strict=True):
        unique = np.unique(answer[(answer >= 0) & (answer < len(vectors))])
        inside = np.isin(unique, near)
        hits += int(inside.sum())
        others = unique[~inside]
        if len(others):
            floor = score[-1] - _TIE * max(abs(float(score[-1])), 1e-30)
            ties = int((scores(query[None], vectors[others], metric)[0] >= floor).sum())
            hits += min(ties, len(near) - int(inside.sum()))
    return hits / truth[0][:, :k].size
