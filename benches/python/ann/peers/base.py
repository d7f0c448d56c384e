"""What the benchmark asks of an index, and the two changes of data that make MIPS easier for the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from ann.truth import Floats, Ids, Metric


@dataclass(frozen=True, slots=True)
class Line:
    """One way of buying recall with time: an integer effort beside settings that stay fixed.

    Attributes
    ----------
    name : str
        What the effort is called in the library, with the fixed settings.
    default : int
        The library's own default, or the value its documentation starts from.
    low, high : int
        Range to search in.
    fixed : Mapping[str, int]
        The other settings.
    """

    name: str
    default: int
    low: int
    high: int
    fixed: Mapping[str, int] = field(default_factory=dict)


class Peer(Protocol):
    """An index under test. Ids are the row numbers of the vectors it was built from, or those given to `add`."""

    #: Bytes of one stored component, which do not count as overhead.
    component_bytes: float
    can_add: bool
    can_remove: bool

    def build(self, vectors: Floats, metric: Metric, threads: int) -> None:
        """Index ``(n, d)`` vectors."""

    def lines(self, k: int) -> list[Line]:
        """Give the sweeps for `k` neighbours; the first one holds the default."""

    def tune(self, line: Line, effort: int) -> None:
        """Set what the next searches use."""

    def threads(self, count: int) -> None:
        """Set the number of threads of searches and additions."""

    def search(self, queries: Floats, k: int) -> Ids:
        """Give the ids of the neighbours of ``(n_queries, d)`` queries in one call, -1 where there is none."""

    def search_one(self, query: Floats, k: int) -> object:
        """Answer one ``(d,)`` query by the library's own fastest call; only timed, in whatever type it answers."""

    def add(self, ids: Ids, vectors: Floats) -> None:
        """Insert."""

    def remove(self, ids: Ids) -> None:
        """Delete."""


class Static:
    """Answers `add` and `remove` of a library that has neither."""

    can_add = False
    can_remove = False

    def add(self, ids: Ids, vectors: Floats) -> None:
        """Refuse."""
        raise NotImplementedError

    def remove(self, ids: Ids) -> None:
        """Refuse."""
        raise NotImplementedError


class Centred:
    """A peer over vectors less their mean: for inner products the ranking stays, and the graph becomes navigable."""

    def __init__(self, inner: Peer) -> None:
        self.inner = inner
        self.component_bytes = inner.component_bytes
        self.can_add, self.can_remove = inner.can_add, inner.can_remove

    def build(self, vectors: Floats, metric: Metric, threads: int) -> None:
        if metric != "ip":
            msg = f"metric: expected 'ip', which centring is for, got {metric!r}"
            raise ValueError(msg)
        self.mean = vectors.mean(0, dtype=np.float64).astype(np.float32)
        self.inner.build(vectors - self.mean, metric, threads)

    def add(self, ids: Ids, vectors: Floats) -> None:
        self.inner.add(ids, vectors - self.mean)

    def remove(self, ids: Ids) -> None:
        self.inner.remove(ids)

    def lines(self, k: int) -> list[Line]:
        return self.inner.lines(k)

    def tune(self, line: Line, effort: int) -> None:
        self.inner.tune(line, effort)

    def threads(self, count: int) -> None:
        self.inner.threads(count)

    def search(self, queries: Floats, k: int) -> Ids:
        return self.inner.search(queries, k)

    def search_one(self, query: Floats, k: int) -> object:
        return self.inner.search_one(query, k)


class Augmented(Centred):
    """Centred, then one more channel that gives all vectors the same norm: L2 order becomes inner product order.

    Bachrach et al. 2014. A vector added later that is longer than all before it keeps its norm: an approximation.
    """

    def build(self, vectors: Floats, metric: Metric, threads: int) -> None:
        self.mean = vectors.mean(0, dtype=np.float64).astype(np.float32)
        squares = ((vectors - self.mean) ** 2).sum(1)
        self.longest = np.float32(squares.max())
        self.inner.build(self._lift(vectors), "l2", threads)

    def add(self, ids: Ids, vectors: Floats) -> None:
        self.inner.add(ids, self._lift(vectors))

    def search(self, queries: Floats, k: int) -> Ids:
        return self.inner.search(np.pad(queries, ((0, 0), (0, 1))), k)

    def search_one(self, query: Floats, k: int) -> object:
        return self.inner.search_one(np.append(query, np.float32(0)), k)

    def _lift(self, vectors: Floats) -> Floats:
        moved = vectors - self.mean
        missing = np.sqrt(np.maximum(self.longest - (moved**2).sum(1), 0))
        return np.column_stack([moved, missing]).astype(np.float32)


def unit(vectors: Floats, metric: Metric) -> Floats:
    """Scale rows to unit length where the metric is cosine and the library only knows inner products."""
    if metric != "cosine":
        return np.ascontiguousarray(vectors)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.asarray(vectors / np.maximum(norms, np.float32(1e-30)), np.float32)


def padded(ids: Ids, k: int) -> Ids:
    """Signed ids ``(n_queries, k)`` of an answer, -1 where there is none."""
    out = np.full((len(ids), k), -1, np.int64)
    out[:, : ids.shape[1]] = ids[:, :k].astype(np.int64)
    return out
