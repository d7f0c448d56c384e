"""Standalone nearest-neighbour index: maximum inner product, squared L2 and cosine; torch is not needed."""

from __future__ import annotations

from .brute import brute_force
from .index import Index
from .result import SearchResult

__all__ = ["Index", "SearchResult", "brute_force"]
