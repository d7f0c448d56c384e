"""LoRANN: clusters with low-rank regression of the scores."""

from __future__ import annotations

import math

import lorann
import numpy as np

from ann.peers.base import Line, Static, padded, unit
from ann.truth import Floats, Ids, Metric


class Lorann(Static):
    """sqrt(n) clusters, rank 32, 8-bit, global dimension 128 above 128; effort is ``clusters_to_search``."""

    component_bytes = 4.0

    def build(self, vectors: Floats, metric: Metric, threads: int) -> None:
        n, dim = vectors.shape
        self.clusters = round(math.sqrt(n))
        self.metric: Metric = metric
        self.index = lorann.LorannIndex(
            data=unit(vectors, metric),
            n_clusters=self.clusters,
            global_dim=128 if dim > 128 else None,
            quantization_bits=8,
            rank=32,
            distance=lorann.L2 if metric == "l2" else lorann.IP,
        )
        self.index.build(approximate=True, n_threads=threads)
        self.effort, self.rerank, self.count = 8, 100, 1

    def lines(self, k: int) -> list[Line]:
        factors = (20, 8, 50) if k <= 10 else (4, 2, 8)
        return [Line(f"clusters, rerank {f * k}", 8, 1, self.clusters, {"rerank": f * k}) for f in factors]

    def tune(self, line: Line, effort: int) -> None:
        self.effort, self.rerank = effort, line.fixed["rerank"]

    def threads(self, count: int) -> None:
        self.count = count

    def search(self, queries: Floats, k: int) -> Ids:
        rows = np.ascontiguousarray(queries)
        return padded(self.index.search(rows, k, self.effort, self.rerank, False, self.count), k)

    def search_one(self, query: Floats, k: int) -> object:
        return self.index.search(query, k, self.effort, self.rerank)
