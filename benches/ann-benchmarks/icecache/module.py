"""IceCache for ann-benchmarks; the folder goes to ``ann_benchmarks/algorithms/icecache`` of its checkout."""

from __future__ import annotations

from typing import TypedDict

import numpy as np
import numpy.typing as npt
from icecache import Index

from ..base.module import BaseANN

#: What ann-benchmarks calls its metrics; its inner product sets come as angular.
_METRICS = {"angular": "cosine", "euclidean": "l2"}


class Arguments(TypedDict):
    """One of ``arg_groups`` in config.yml."""

    dtype: str


class IceCache(BaseANN):
    """Pages of 16 vectors; the one query argument is ``beam``, the pages scored exactly, 0 for the default."""

    def __init__(self, metric: str, arguments: Arguments) -> None:
        if metric not in _METRICS:
            msg = f"metric: expected one of {sorted(_METRICS)}, got {metric!r}"
            raise ValueError(msg)
        self._metric = _METRICS[metric]
        self._dtype = arguments["dtype"]
        self._beam: int | None = None
        self.name = f"icecache ({self._dtype})"

    def fit(self, X: npt.NDArray[np.float32]) -> None:  # noqa: N803 - the benchmark's name
        """Index every row of X, (n, d); row numbers become ids."""
        self._index = Index.build(X, metric=self._metric, dtype=self._dtype)

    def set_query_arguments(self, beam: int) -> None:
        """Set the effort of the next queries."""
        self._beam = beam or None
        self.name = f"icecache ({self._dtype}, beam {beam or 'default'})"

    def query(self, q: npt.NDArray[np.float32], n: int) -> npt.NDArray[np.int64]:
        """Ids of the n nearest rows; fewer if the index holds fewer."""
        ids = self._index.search(q, n, beam=self._beam).ids
        return ids[ids >= 0]

    def batch_query(self, X: npt.NDArray[np.float32], n: int) -> None:  # noqa: N803
        """Ask all rows of X at once, on the index's own threads."""
        self._found = self._index.search(X, n, beam=self._beam).ids

    def get_batch_results(self) -> list[npt.NDArray[np.int64]]:
        """Ids of the last batch, a row per query."""
        return [ids[ids >= 0] for ids in self._found]

    def get_additional(self) -> dict[str, int]:
        """Figures kept with the result."""
        return {"index_bytes": self._index.nbytes()}
