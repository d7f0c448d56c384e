"""usearch: HNSW with quantised storage (bfloat16 unless told otherwise)."""

from __future__ import annotations

import numpy as np
from usearch.index import BatchMatches, Index

from ann.peers.base import Line
from ann.truth import Floats, Ids, Metric


class USearch:
    """Defaults: connectivity 16, expansion_add 128; effort is ``expansion_search``."""

    can_add = True
    can_remove = True
    component_bytes = 2.0

    def build(self, vectors: Floats, metric: Metric, threads: int) -> None:
        name = {"ip": "ip", "l2": "l2sq", "cosine": "cos"}[metric]
        self.index = Index(ndim=vectors.shape[1], metric=name)
        self.index.add(np.arange(len(vectors)), vectors, threads=threads)
        self.count = 1

    def lines(self, k: int) -> list[Line]:
        return [Line("expansion_search", max(k, 64), k, 4096)]

    def tune(self, line: Line, effort: int) -> None:
        self.index.expansion_search = effort

    def threads(self, count: int) -> None:
        self.count = count

    def search(self, queries: Floats, k: int) -> Ids:
        found = self.index.search(queries, k, threads=self.count)
        assert isinstance(found, BatchMatches)
        missing = np.arange(k)[None] >= found.counts[:, None]  # empty places hold key 0
        return np.where(missing, -1, found.keys.astype(np.int64))

    def search_one(self, query: Floats, k: int) -> object:
        return self.index.search(query, k, threads=1)

    def add(self, ids: Ids, vectors: Floats) -> None:
        self.index.add(ids, vectors, threads=self.count)

    def remove(self, ids: Ids) -> None:
        self.index.remove(ids, threads=self.count)
