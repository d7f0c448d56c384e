"""Ground truth: exact neighbours by looking at every vector."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from icecache.index.check import as_count, one_of
from icecache.index.convert import as_matrix
from icecache.index.result import SearchResult

Metric = Literal["ip", "l2", "cosine"]
#: Queries scored at once; bounds the memory to this times the number of vectors.
_BLOCK = 64


def brute_force(queries: npt.ArrayLike, vectors: npt.ArrayLike, k: int = 10, metric: Metric = "ip") -> SearchResult:
    """Find the exact neighbours of each query.

    Parameters
    ----------
    queries : array_like, (n_queries, dim) or (dim,)
    vectors : array_like, (n, dim)
        Their ids are their row numbers.
    k : int, default=10
        Neighbours per query.
    metric : {"ip", "l2", "cosine"}, default="ip"
        Distance: minus the inner product, squared L2, or 1 - cosine (1 where a vector is zero).

    Returns
    -------
    SearchResult
        ids (n_queries, k) int64 and distances float32, ascending, ties by id, padded with -1 and +inf.

    Raises
    ------
    TypeError, ValueError
        If the arguments are not matrices of finite numbers of the same width, or the metric is unknown.

    Notes
    -----
    Computed in float64 with NumPy. It is the reference the index is measured against, not a fast path.
    """
    one_of(metric, "metric", ("ip", "l2", "cosine"))
    k = as_count(k, "k")
    dim = np.shape(vectors)[-1] if np.ndim(vectors) == 2 else np.shape(queries)[-1]
    base32, _ = as_matrix(vectors, "vectors", dim)
    query32, single = as_matrix(queries, "queries", dim)
    for name, rows in (("vectors", base32), ("queries", query32)):
        if not np.isfinite(rows).all():
            row = int(np.argmin(np.isfinite(rows).all(axis=1)))
            msg = f"{name}: expected finite numbers, got NaN or infinity in row {row}"
            raise ValueError(msg)
    base, query = base32.astype(np.float64), query32.astype(np.float64)
    ids = np.full((len(query), k), -1, np.int64)
    distances = np.full((len(query), k), np.inf, np.float32)
    found = min(k, len(base))
    for start in range(0, len(query) if found else 0, _BLOCK):
        block = slice(start, start + _BLOCK)
        table = _distances(query[block], base, metric)
        order = np.argsort(table, axis=1, kind="stable")[:, :found]
        ids[block, :found] = order
        distances[block, :found] = np.take_along_axis(table, order, axis=1)
    return SearchResult(ids[0], distances[0]) if single else SearchResult(ids, distances)


def _distances(
    query: npt.NDArray[np.float64], base: npt.NDArray[np.float64], metric: Metric
) -> npt.NDArray[np.float64]:
    """All distances, (n_queries, n)."""
    dots: npt.NDArray[np.float64] = query @ base.T
    if metric == "ip":
        return np.negative(dots)
    if metric == "l2":
        squares = (query * query).sum(1)[:, None] - 2.0 * dots + (base * base).sum(1)[None, :]
        return np.asarray(np.maximum(squares, 0.0), np.float64)
    norms = np.linalg.norm(query, axis=1)[:, None] * np.linalg.norm(base, axis=1)[None, :]
    cosines: npt.NDArray[np.float64] = np.divide(dots, norms, out=np.zeros_like(dots), where=norms > 0)
    return np.subtract(1.0, cosines)
