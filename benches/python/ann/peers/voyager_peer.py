"""voyager: hnswlib with an order-preserving transform for inner products."""

from __future__ import annotations

import numpy as np
import voyager

from ann.peers.base import Line
from ann.truth import Floats, Ids, Metric


class Voyager:
    """M 16 (its default is 12; 16 matches the other graphs), ef_construction 200; effort is ``query_ef``."""

    component_bytes = 4.0
    can_add = True
    can_remove = True

    def build(self, vectors: Floats, metric: Metric, threads: int) -> None:
        space = {"ip": voyager.Space.InnerProduct, "l2": voyager.Space.Euclidean, "cosine": voyager.Space.Cosine}[
            metric
        ]
        self.index = voyager.Index(space, vectors.shape[1], M=16, ef_construction=200)
        # It refuses read-only arrays and takes ids as a list only.
        self.index.add_items(np.array(vectors), list(range(len(vectors))), num_threads=threads)
        self.count, self.effort = 1, 10

    def lines(self, k: int) -> list[Line]:
        return [Line("query_ef", max(k, 10), k, 4096)]

    def tune(self, line: Line, effort: int) -> None:
        self.effort = effort

    def threads(self, count: int) -> None:
        self.count = count

    def search(self, queries: Floats, k: int) -> Ids:
        ids, _ = self.index.query(np.array(queries), k, num_threads=self.count, query_ef=self.effort)
        return ids.astype(np.int64)

    def search_one(self, query: Floats, k: int) -> object:
        return self.index.query(query.copy(), k, num_threads=1, query_ef=self.effort)

    def add(self, ids: Ids, vectors: Floats) -> None:
        self.index.add_items(np.array(vectors), ids.tolist(), num_threads=self.count)

    def remove(self, ids: Ids) -> None:
        for row in ids:
            self.index.mark_deleted(int(row))
