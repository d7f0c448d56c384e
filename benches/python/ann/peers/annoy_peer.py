"""annoy: random projection trees, frozen once built."""

from __future__ import annotations

import numpy as np
from annoy import AnnoyIndex

from ann.peers.base import Line, Static
from ann.truth import Floats, Ids, Metric

_TREES = 50


class Annoy(Static):
    """50 trees; effort is ``search_k`` in units of trees times k, whose default is 1. One query a call."""

    component_bytes = 4.0

    def build(self, vectors: Floats, metric: Metric, threads: int) -> None:
        name = {"ip": "dot", "l2": "euclidean", "cosine": "angular"}[metric]
        self.index = AnnoyIndex(vectors.shape[1], name)
        self.index.set_seed(1)
        for row, vector in enumerate(vectors):
            self.index.add_item(row, vector)
        self.index.build(_TREES, n_jobs=threads)
        self.effort = 1

    def lines(self, k: int) -> list[Line]:
        return [Line("search_k / (trees k)", 1, 1, max(2, self.index.get_n_items() // (_TREES * k)))]

    def tune(self, line: Line, effort: int) -> None:
        self.effort = effort

    def threads(self, count: int) -> None:
        """Do nothing: queries of annoy run on the calling thread."""

    def search(self, queries: Floats, k: int) -> Ids:
        out = np.full((len(queries), k), -1, np.int64)
        for row, query in enumerate(queries):
            found = self.index.get_nns_by_vector(query, k, self.effort * _TREES * k)
            out[row, : len(found)] = found
        return out

    def search_one(self, query: Floats, k: int) -> object:
        return self.index.get_nns_by_vector(query, k, self.effort * _TREES * k)
