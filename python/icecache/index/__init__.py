"""Standalone nearest-neighbour index: maximum inner product, squared L2 and cosine; torch is not needed."""

from __future__ import annotations

from icecache.index.brute import brute_force
from icecache.index.filter import Filter
from icecache.index.index import Index
from icecache.index.result import Calibration, PageResult, Pages, RangeResult, SearchResult

__all__ = ["Calibration", "Filter", "Index", "PageResult", "Pages", "RangeResult", "SearchResult", "brute_force"]
