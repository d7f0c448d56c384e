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

    def recall(self, truth: SearchResult | npt.NDArray[np.int64]) -> float:
        """Share of the true neighbours that were found, by distance where both results have them.

        Parameters
        ----------
        truth : SearchResult or int64 array, same shape
            The exact result, or only its ids; places with an id of -1 do not count. With distances, a neighbour as
            close as the true last one counts as found, whichever of several equally close ones it is.

        Returns
        -------
        float
            In [0, 1]; 1 where there is nothing to find.

        Raises
        ------
        ValueError
            If the shapes differ.
        """
        true_ids = truth.ids if isinstance(truth, SearchResult) else np.asarray(truth)
        if true_ids.shape != self.ids.shape:
            msg = f"truth: expected shape {self.ids.shape}, got {true_ids.shape}"
            raise ValueError(msg)
        k = self.ids.shape[-1]
        rows, true_rows = self.ids.reshape(-1, k), true_ids.reshape(-1, k)
        wanted = int((true_rows >= 0).sum())
        if wanted == 0:
            return 1.0
        if isinstance(truth, SearchResult):
            real = np.where(true_rows >= 0, truth.distances.reshape(-1, k), -np.inf)
            worst = real.max(axis=1, keepdims=True)
            near = self.distances.reshape(-1, k) <= worst + 1e-5 * np.abs(worst)
            found = np.minimum((near & (rows >= 0)).sum(axis=1), (true_rows >= 0).sum(axis=1)).sum()
        else:
            found = sum(len(np.intersect1d(row[row >= 0], true)) for row, true in zip(rows, true_rows, strict=True))
        return float(found) / wanted


class Calibration(NamedTuple):
    """How recall grows with the pages visited, measured on a sample; unpacks as ``beams, recalls, errors``.

    Attributes
    ----------
    beams : int64 array, (n,)
        Pages visited per query, ascending; the last one finds all but 1 in 2000 or is half of all pages. Empty where
        the index is so small that a search looks at every vector.
    recalls : float32 array, (n,)
        Mean share of the k nearest vectors that was found.
    errors : float32 array, (n,)
        Standard error of that mean.
    """

    beams: npt.NDArray[np.int64]
    recalls: npt.NDArray[np.float32]
    errors: npt.NDArray[np.float32]


class RangeResult(NamedTuple):
    """Vectors within a radius, query after query; unpacks as ``lims, ids, distances`` (the layout of faiss).

    Attributes
    ----------
    lims : int64 array, (n_queries + 1,)
        Query ``i`` has the entries ``lims[i]:lims[i + 1]``. For one query, (2,).
    ids : int64 array, (lims[-1],)
    distances : float32 array, (lims[-1],)
        Ascending within a query.
    """

    lims: npt.NDArray[np.int64]
    ids: npt.NDArray[np.int64]
    distances: npt.NDArray[np.float32]

    def query(self, number: int) -> SearchResult:
        """Give the neighbours of one query."""
        part = slice(self.lims[number], self.lims[number + 1])
        return SearchResult(self.ids[part], self.distances[part])


class PageResult(NamedTuple):
    """Pages for groups of queries; unpacks as ``pages, scores, mass``.

    Attributes
    ----------
    pages : int32 array, (n_groups, n_pages), or (n_pages,) for one query
        Best first; row numbers of `Index.pages` of the same snapshot. -1 where there are fewer.
    scores : float32 array, same shape
        Share of the softmax mass that the page holds, averaged over the group.
    mass : float32 array, (n_queries,), or () for one query
        Share of the softmax mass that all of them hold.
    """

    pages: npt.NDArray[np.int32]
    scores: npt.NDArray[np.float32]
    mass: npt.NDArray[np.float32]


class Pages(NamedTuple):
    """All pages of an index by column; a page that lost all its vectors stays, with a count of 0.

    Attributes
    ----------
    ids : int64 array, (n_pages, 16)
        Ids of the vectors of each page, then -1.
    counts : uint8 array, (n_pages,)
    means : float32 array, (n_pages, dim)
        Means of the vectors; for ``cosine`` of the normalised ones.
    spreads : float32 array, (n_pages,)
        Root mean square distance of the vectors to their mean.
    generations : uint32 array, (n_pages,)
        How often the page's memory had been used before.
    """

    ids: npt.NDArray[np.int64]
    counts: npt.NDArray[np.uint8]
    means: npt.NDArray[np.float32]
    spreads: npt.NDArray[np.float32]
    generations: npt.NDArray[np.uint32]
