"""Exact search in NumPy: what the tests compare with, and a peer that is always installed."""

from __future__ import annotations

import numpy as np

from ann.peers.base import Line
from ann.truth import Floats, Ids, Metric, exact


class Brute:
    """Every vector is looked at; there is no effort."""

    component_bytes = 4.0
    can_add = True
    can_remove = True

    def build(self, vectors: Floats, metric: Metric, threads: int) -> None:
        self.rows, self.ids, self.metric = np.array(vectors), np.arange(len(vectors)), metric

    def lines(self, k: int) -> list[Line]:
        return [Line("exact", 1, 1, 1)]

    def tune(self, line: Line, effort: int) -> None:
        """Nothing to set."""

    def threads(self, count: int) -> None:
        """NumPy's BLAS decides for itself."""

    def search(self, queries: Floats, k: int) -> Ids:
        found: Ids = self.ids[exact(queries, self.rows, self.metric, k)[0]]
        return found

    def search_one(self, query: Floats, k: int) -> object:
        return self.search(query[None], k)

    def add(self, ids: Ids, vectors: Floats) -> None:
        self.rows = np.concatenate([self.rows, vectors])
        self.ids = np.concatenate([self.ids, ids])

    def remove(self, ids: Ids) -> None:
        keep = ~np.isin(self.ids, ids)
        self.rows, self.ids = self.rows[keep], self.ids[keep]
