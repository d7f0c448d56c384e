"""faiss: exact search through BLAS, inverted lists, HNSW, and product quantisation with a second, exact look."""

from __future__ import annotations

import math

import faiss
import numpy as np

from ann.peers.base import Line, padded, unit
from ann.truth import Floats, Ids, Metric


class Faiss:
    """An index of the factory; effort is ``nprobe`` or ``efSearch``.

    Parameters
    ----------
    kind : {"flat", "ivf", "hnsw", "ivfpqfs"}
        ``ivf`` has 4 sqrt(n) lists as the wiki advises; ``ivfpqfs`` adds 4-bit codes of 2 dimensions each (fast scan)
        and re-ranks with the float32 vectors.
    """

    component_bytes = 4.0

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self.can_add = True
        # `remove_ids` of the flat index closes gaps, so row numbers would shift; the others have none.
        self.can_remove = kind == "ivf"

    def build(self, vectors: Floats, metric: Metric, threads: int) -> None:
        faiss.omp_set_num_threads(threads)
        n, dim = vectors.shape
        lists = 1 << round(math.log2(4 * math.sqrt(n)))
        name = {
            "flat": "Flat",
            "ivf": f"IVF{lists},Flat",
            "hnsw": "HNSW32,Flat",
            "ivfpqfs": f"IVF{lists},PQ{dim // 2}x4fs,RFlat",
        }[self.kind]
        kind = faiss.METRIC_L2 if metric == "l2" else faiss.METRIC_INNER_PRODUCT
        self.metric: Metric = metric
        self.index = faiss.index_factory(dim, name, kind)
        rows = unit(vectors, metric)
        if not self.index.is_trained:
            self.index.train(rows)
        self.index.add(rows)
        self.lists = lists
        self.threads(1)

    def lines(self, k: int) -> list[Line]:
        if self.kind == "flat":
            return [Line("exact", 1, 1, 1)]
        if self.kind == "hnsw":
            return [Line("efSearch", max(k, 16), k, 4096)]
        if self.kind == "ivf":
            return [Line("nprobe", 1, 1, self.lists)]
        return [Line(f"nprobe, {factor}k refined", 1, 1, self.lists, {"refine": factor}) for factor in (5, 2, 20)]

    def tune(self, line: Line, effort: int) -> None:
        if self.kind == "hnsw":
            self.index.hnsw.efSearch = effort
        elif self.kind == "ivf":
            self.index.nprobe = effort
        elif self.kind == "ivfpqfs":
            faiss.extract_index_ivf(self.index.base_index).nprobe = effort
            self.index.k_factor = line.fixed["refine"]

    def threads(self, count: int) -> None:
        faiss.omp_set_num_threads(count)

    def search(self, queries: Floats, k: int) -> Ids:
        return padded(self.index.search(queries, k)[1], k)

    def search_one(self, query: Floats, k: int) -> object:
        return self.index.search(query[None], k)

    def add(self, ids: Ids, vectors: Floats) -> None:
        if self.kind == "ivf":
            self.index.add_with_ids(unit(vectors, self.metric), np.ascontiguousarray(ids))
            return
        if ids[0] != self.index.ntotal:
            msg = f"ids: faiss numbers vectors itself, expected {self.index.ntotal} next, got {ids[0]}"
            raise ValueError(msg)
        self.index.add(unit(vectors, self.metric))

    def remove(self, ids: Ids) -> None:
        self.index.remove_ids(np.ascontiguousarray(ids))
