"""What a search returns."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt


class SearchResult(NamedTuple):
    """Neighbours of each query, nearest first; unpacks as ``ids, distances``.

    Attributes
    ----------
    ids : int64 array, (n_queries, k) or (k,) for one query
        -1 where the index holds fewer than k vectors.
    distances : float32 array, same shape
        Ascending, smaller = closer: squared L2, 1 - cosine, or minus the inner product. +inf beside an id of -1.
    """

    ids: npt.NDArray[np.int64]
    distances: npt.NDArray[np.float32]

    @property
    def scores(self) -> npt.NDArray[np.float32]:
        """Minus the distances, larger = closer: for ``ip`` the inner product itself. -inf beside an id of -1."""
        return np.negative(self.distances)

    @property
    def counts(self) -> npt.NDArray[np.int64]:
        """How many neighbours each query got, (n_queries,) or () for one query."""
        return np.asarray((self.ids >= 0).sum(axis=-1), dtype=np.int64)
