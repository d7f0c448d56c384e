"""The part of `Index` that reads: search, by id, pages, numbers."""

from __future__ import annotations

from typing import Literal

import numpy as np
import numpy.typing as npt

from icecache._core import Pool, VectorIndex
from icecache.index.check import as_count, as_real, one_of
from icecache.index.convert import as_ids, as_matrix, from_tensor
from icecache.index.filter import FilterLike, as_filter
from icecache.index.pool import shared_pool
from icecache.index.result import Calibration, PageResult, Pages, RangeResult, SearchResult

Scorer = Literal["auto", "exact"]


class Reading:
    """What an index answers; every call sees one snapshot and waits for no writer."""

    __slots__ = ("_core", "_threads", "beam")

    _core: VectorIndex
    _threads: int | None
    beam: int | None

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self._core.dim

    @property
    def metric(self) -> str:
        """``ip``, ``l2`` or ``cosine``."""
        return self._core.metric

    @property
    def dtype(self) -> str:
        """How vectors are stored."""
        return self._core.dtype

    @property
    def codes(self) -> bool:
        """Whether 4-bit codes of the vectors are kept where they pay."""
        return self._core.codes

    @property
    def page_tokens(self) -> int:
        """Vectors of a full page."""
        return 16

    @property
    def read_only(self) -> bool:
        """Whether this is a snapshot or a mapped file, which cannot be written to."""
        return self._core.read_only

    @property
    def mean(self) -> npt.NDArray[np.float32]:
        """What is subtracted from every vector before it is stored, (dim,): zeros until there are 1024 vectors."""
        return self._core.mean()

    def _pool(self, threads: int | None) -> Pool:
        return shared_pool(self._threads if threads is None else threads)

    def search(
        self,
        queries: npt.ArrayLike,
        k: int = 10,
        *,
        beam: int | None = None,
        recall: float | None = None,
        filter: FilterLike | None = None,  # noqa: A002 -- the name users look for
        exact: bool = False,
        threads: int | None = None,
        out: tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]] | None = None,
    ) -> SearchResult:
        """Find the `k` nearest vectors of each query.

        Parameters
        ----------
        queries : array_like, (n_queries, dim) or (dim,)
        k : int, default=10
            Neighbours per query. More than the index holds is fine: the rest is padded with -1 and +inf.
        beam : int, optional
            Pages scored exactly per query. Default: the attribute `beam`, or as many as this query needs.
        recall : float, optional
            Share of the `k` nearest to be found on average, above 0 and at most 1: so many pages are scored as it takes
            for the queries of `calibrate`, and one standard error more. Not beside `beam`. The first such search for a
            `k` (in steps of 1, 2, 5, 10, ..), and one after a quarter of the vectors has changed, measures that: some
            256 exact searches. 1 looks at every vector.
        filter : Filter or bool array, (n,), or array_like of int, (m,), optional
            Return allowed ids only (see `Filter`). Fewer than `k` allowed: padded as above.
        exact : bool, default=False
            Look at every vector.
        threads : int, optional
            Worker threads of this call. Default: the index's.
        out : (int64 array, float32 array), optional
            Where ids and distances are written, C-contiguous and of the result's shape.

        Returns
        -------
        SearchResult
            ids int64 and distances float32, (n_queries, k), or (k,) for one query; nearest first, ties by id.

        Raises
        ------
        ValueError, TypeError
            Wrong shape or dtype, NaN or infinity (the message names the row), negative `k`, `beam` under 1, `recall`
            not in (0, 1] or beside `beam`.
        """
        matrix, single = as_matrix(queries, "queries", self.dim)
        k = as_count(k, "k")
        recall = None if recall is None else as_real(recall, "recall")
        if recall is not None and not 0 < recall <= 1:
            msg = f"recall: expected above 0 and at most 1, got {recall}"
            raise ValueError(msg)
        if recall is not None and beam is not None:
            msg = f"recall: expected None beside beam={beam}, got {recall}"
            raise ValueError(msg)
        beam = self.beam if beam is None and recall is None else beam
        if beam is not None:
            beam = as_count(beam, "beam", 1, " page")
        if out is not None and not (isinstance(out, (tuple, list)) and len(out) == 2):
            msg = f"out: expected two arrays, for ids and for distances, got {type(out).__name__}"
            raise TypeError(msg)
        pool = self._pool(threads) if len(matrix) > 1 or recall is not None else None
        rows = None if out is None else (out[0][None], out[1][None]) if single else (out[0], out[1])
        ids, distances = self._core.search(
            pool, matrix, k, beam=beam, recall=recall, exact=exact, filter=as_filter(filter), out=rows
        )
        return SearchResult(ids[0], distances[0]) if single else SearchResult(ids, distances)

    def calibrate(self, k: int = 10, *, threads: int | None = None) -> Calibration:
        """Give the curve by which ``search(..., recall=...)`` chooses how many pages to score for the `k` nearest.

        It is measured, unless it is known already, with the queries given to `Index.build` or `Index.set_sample`, else
        with stored vectors, which do not find themselves. Kept with the index, also in files.

        Parameters
        ----------
        k : int, default=10
            1..=10000; rounded up to 1, 2, 5, 10, 20, 50, ..
        threads : int, optional
            Worker threads of this call. Default: the index's.

        Raises
        ------
        ValueError
            If `k` is out of range.
        """
        return Calibration(*self._core.calibrate(self._pool(threads), k))

    def range_search(
        self,
        queries: npt.ArrayLike,
        radius: float,
        *,
        beam: int | None = None,
        filter: FilterLike | None = None,  # noqa: A002 -- the name users look for
        max_results: int | None = None,
        threads: int | None = None,
    ) -> RangeResult:
        """Find all vectors whose distance from a query is at most `radius`.

        Parameters
        ----------
        queries : array_like, (n_queries, dim) or (dim,)
        radius : float
            In the metric's distance: for ``ip`` minus the inner product, so ``radius=-5`` finds products from 5 on.
        beam : int, optional
            Sealed pages scored per query, the most promising ones. Default: all that may hold a result; it is exact.
        filter, threads
            As for `search`.
        max_results : int, optional
            Keep the nearest so many per query.

        Raises
        ------
        ValueError, TypeError
            As `search`, or `radius` is NaN.
        """
        matrix, _ = as_matrix(queries, "queries", self.dim)
        radius = as_real(radius, "radius")
        pool = self._pool(threads) if len(matrix) > 1 else None
        chosen = as_filter(filter)
        return RangeResult(
            *self._core.range_search(pool, matrix, radius, beam=beam, filter=chosen, max_results=max_results)
        )

    def search_pages(
        self,
        queries: npt.ArrayLike,
        n_pages: int,
        *,
        group: int = 1,
        scaling: float | None = None,
        scorer: Scorer = "auto",
        threads: int | None = None,
    ) -> PageResult:
        """Find the pages that hold the most softmax mass: what sparse attention over the vectors as keys reads.

        Parameters
        ----------
        queries : array_like, (n_queries, dim) or (dim,)
        n_pages : int
            Pages per group. More than there are is fine: the rest is -1.
        group : int, default=1
            So many consecutive queries share their pages: the query heads of one KV head.
        scaling : float, default=dim ** -0.5
            Factor of the inner product before the softmax.
        scorer : {"auto", "exact"}, default="auto"
            Score the most promising pages exactly, or all.
        threads : int, optional
            Worker threads of this call. Default: the index's.

        Raises
        ------
        ValueError, TypeError
            As `search`; the metric is not ``ip``; `group` does not divide the number of queries.
        """
        one_of(scorer, "scorer", ("auto", "exact"))
        matrix, single = as_matrix(queries, "queries", self.dim)
        group, n_pages = as_count(group, "group", 1), as_count(n_pages, "n_pages")
        if len(matrix) % group:
            msg = f"group: expected a divisor of the number of queries, {len(matrix)}, got {group}"
            raise ValueError(msg)
        scaling = None if scaling is None else as_real(scaling, "scaling")
        pool = self._pool(threads) if len(matrix) > group else None
        pages, scores, mass = self._core.search_pages(
            pool, matrix, n_pages, group=group, scaling=scaling, exact=scorer == "exact"
        )
        return PageResult(pages[0], scores[0], mass[0]) if single else PageResult(pages, scores, mass)

    def pages(self) -> Pages:
        """Give all pages by column; see `Pages`. Copies what it returns."""
        return Pages(*self._core.pages())

    def get(self, ids: npt.ArrayLike, *, out: npt.NDArray[np.float32] | None = None) -> npt.NDArray[np.float32]:
        """Vectors by id, as they were given, to within the rounding of the dtype they are stored in.

        Parameters
        ----------
        ids : array_like of int, (n,) or one int
        out : float32 array, (n, dim), optional
            Where the vectors are written.

        Returns
        -------
        float32 array, (n, dim), or (dim,) for one id

        Raises
        ------
        KeyError
            If an id is not in the index.
        """
        single = np.ndim(from_tensor(ids, "ids")) == 0
        rows = self._core.get(as_ids(ids), None if out is None else out[None] if single else out)
        return rows[0] if single else rows

    def __getitem__(self, ids: npt.ArrayLike) -> npt.NDArray[np.float32]:
        return self.get(ids)

    def contains(self, ids: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Whether the index holds each id, bool (n,)."""
        return self._core.contains(as_ids(ids))

    def __contains__(self, vector_id: object) -> bool:
        if isinstance(vector_id, bool) or not isinstance(vector_id, (int, np.integer)):
            return False
        return 0 <= int(vector_id) < 2**63 and bool(self._core.contains(as_ids([int(vector_id)]))[0])

    def __len__(self) -> int:
        return len(self._core)

    #: Not iterable: `__getitem__` takes ids, so the default iteration would be wrong.
    __iter__ = None

    def nbytes(self) -> int:
        """Bytes of memory the index holds: pages, summaries, ids."""
        return self._core.nbytes()

    def stats(self) -> dict[str, int]:
        """Count vectors, removed (not yet reclaimed), segments, pages, tail, page_bytes, index_bytes, compactions."""
        return self._core.stats()

    def validate(self) -> None:
        """Check every invariant of the structure; for tests.

        Raises
        ------
        RuntimeError
            Names the invariant that does not hold.
        """
        self._core.validate()
