"""hnswlib: the reference implementation of HNSW."""

from __future__ import annotations

import hnswlib
import numpy as np

from ann.peers.base import Line
from ann.truth import Floats, Ids, Metric

_SPARE = 1.5  # the capacity is fixed at the start


class Hnswlib:
    """M 16, ef_construction 200 (its defaults); effort is ``ef``."""

    component_bytes = 4.0
    can_add = True
    can_remove = True

    def build(self, vectors: Floats, metric: Metric, threads: int) -> None:
        self.index = hnswlib.Index(space=metric, dim=vectors.shape[1])
        self.index.init_index(max_elements=int(_SPARE * len(vectors)) + 1, M=16, ef_construction=200, random_seed=100)
        self.index.add_items(vectors, np.arange(len(vectors)), num_threads=threads)
        self.count = 1

    def lines(self, k: int) -> list[Line]:
        return [Line("ef", max(k, 10), k, 4096)]

    def tune(self, line: Line, effort: int) -> None:
        self.index.set_ef(effort)

    def threads(self, count: int) -> None:
        self.count = count

    def search(self, queries: Floats, k: int) -> Ids:
        ids, _ = self.index.knn_query(queries, k, num_threads=self.count)
        return ids.astype(np.int64)

    def search_one(self, query: Floats, k: int) -> object:
        return self.index.knn_query(query, k, num_threads=1)

    def add(self, ids: Ids, vectors: Floats) -> None:
        self.index.add_items(vectors, ids, num_threads=self.count)

    def remove(self, ids: Ids) -> None:
        for row in ids:
            self.index.mark_deleted(int(row))
