"""SVS: Intel's Vamana graph."""

from __future__ import annotations

import numpy as np
import svs

from ann.peers.base import Line, Static, unit
from ann.truth import Floats, Ids, Metric


class Svs(Static):
    """Graph degree 32, build window 64, alpha 1.2 (L2) or .95 (the others); effort is the search window."""

    component_bytes = 4.0

    def build(self, vectors: Floats, metric: Metric, threads: int) -> None:
        distance = svs.DistanceType.L2 if metric == "l2" else svs.DistanceType.MIP
        parameters = svs.VamanaBuildParameters(
            alpha=1.2 if metric == "l2" else 0.95, graph_max_degree=32, window_size=64
        )
        self.index = svs.Vamana.build(parameters, unit(vectors, metric), distance, num_threads=threads)
        self.threads(1)

    def lines(self, k: int) -> list[Line]:
        return [Line("search_window_size", max(k, 10), k, 4096)]

    def tune(self, line: Line, effort: int) -> None:
        self.index.search_window_size = effort

    def threads(self, count: int) -> None:
        self.index.num_threads = count

    def search(self, queries: Floats, k: int) -> Ids:
        ids, _ = self.index.search(np.ascontiguousarray(queries), k)
        return ids.astype(np.int64)

    def search_one(self, query: Floats, k: int) -> object:
        return self.index.search(query[None], k)
