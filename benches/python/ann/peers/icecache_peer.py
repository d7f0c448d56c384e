"""Ours: `icecache.Index`."""

from __future__ import annotations

from icecache import Index
from icecache.index.index import Dtype

from ann.peers.base import Line
from ann.truth import Floats, Ids, Metric

_PAGE = 16


class IceCache:
    """Default settings; effort is ``beam``, the pages scored exactly."""

    can_add = True
    can_remove = True

    def __init__(self, dtype: Dtype = "float32") -> None:
        self.dtype: Dtype = dtype
        self.component_bytes = 4.0 if dtype == "float32" else 2.0
        self.beam: int | None = None
        self.count = 1

    def build(self, vectors: Floats, metric: Metric, threads: int) -> None:
        self.index = Index.build(vectors, metric=metric, dtype=self.dtype, threads=threads)
        self.pages = -(-len(vectors) // _PAGE)

    def lines(self, k: int) -> list[Line]:
        # Effort 0 stands for the default, by which each query decides for itself.
        return [Line("beam", 0, max(1, k // _PAGE), self.pages)]

    def tune(self, line: Line, effort: int) -> None:
        self.beam = effort or None

    def threads(self, count: int) -> None:
        self.count = count

    def search(self, queries: Floats, k: int) -> Ids:
        return self.index.search(queries, k, beam=self.beam, threads=self.count).ids

    def search_one(self, query: Floats, k: int) -> object:
        return self.index.search(query, k, beam=self.beam)

    def own_bytes(self) -> int:
        """Bytes the index says it holds."""
        return self.index.nbytes()

    def add(self, ids: Ids, vectors: Floats) -> None:
        self.index.add(vectors, ids, threads=self.count)

    def remove(self, ids: Ids) -> None:
        self.index.remove(ids)
