"""ScaNN: partitions, anisotropic 4-bit codes, exact re-ranking."""

from __future__ import annotations

import math

import numpy as np
from scann import scann_ops_pybind

from ann.peers.base import Line, Static, padded, unit
from ann.truth import Floats, Ids, Metric


class Scann(Static):
    """sqrt(n) leaves, two dimensions per code, threshold .2 (its README); effort is ``leaves_to_search``."""

    component_bytes = 4.0

    def build(self, vectors: Floats, metric: Metric, threads: int) -> None:
        self.leaves = round(math.sqrt(len(vectors)))
        distance = "squared_l2" if metric == "l2" else "dot_product"
        builder = scann_ops_pybind.builder(unit(vectors, metric), 10, distance)
        builder = builder.set_n_training_threads(threads)
        builder = builder.tree(num_leaves=self.leaves, num_leaves_to_search=10, training_sample_size=len(vectors))
        builder = builder.score_ah(2, anisotropic_quantization_threshold=0.2).reorder(100)
        self.index = builder.build()
        self.leaf_count, self.reorder = 10, 100
        self.count = 1

    def lines(self, k: int) -> list[Line]:
        # README: leaves_to_search ~ sqrt(num_leaves) up, reorder a few times k.
        default = max(1, round(math.sqrt(self.leaves)))
        # Where the codes are too coarse (squared L2, for which it cannot encode residuals) only long re-ranking helps.
        factors = (10, 5, 30, 100, 300) if k <= 10 else (3, 2, 8, 30)
        return [Line(f"leaves, reorder {f * k}", default, 1, self.leaves, {"reorder": f * k}) for f in factors]

    def tune(self, line: Line, effort: int) -> None:
        self.leaf_count, self.reorder = effort, line.fixed["reorder"]

    def threads(self, count: int) -> None:
        self.count = count
        self.index.set_num_threads(count)

    def search(self, queries: Floats, k: int) -> Ids:
        call = self.index.search_batched if self.count == 1 else self.index.search_batched_parallel
        ids, _ = call(queries, k, self.reorder, self.leaf_count)
        return padded(ids.view(np.int32) if ids.dtype == np.uint32 else ids, k)

    def search_one(self, query: Floats, k: int) -> object:
        return self.index.search(query, k, self.reorder, self.leaf_count)
