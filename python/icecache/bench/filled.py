"""One filled cache for cells that differ in budget alone: filling one of 300k tokens takes longer than timing it."""

from __future__ import annotations

import copy
import gc
from typing import TYPE_CHECKING

from icecache.bench.synthetic import Content, fill
from icecache.errors import CacheStateError
from icecache.hf.cache import RetrievalLayer
from icecache.runtime import IceRuntime

if TYPE_CHECKING:
    from transformers.cache_utils import Cache


class Filled:
    """Keeps a fork of the cache that was filled last; pages are shared until one side writes."""

    def __init__(self) -> None:
        self._content: Content | None = None
        self._cache: Cache | None = None

    def fill(self, runtime: IceRuntime, cache: Cache, content: Content) -> bool:
        """Fill an empty cache of `runtime`, with the pages of the one kept where they fit.

        Returns
        -------
        bool
            Whether they did. Otherwise this cache is kept from now on.
        """
        if self._cache is not None and self._content == content:
            try:
                cache.layers[:] = runtime.adopt(self._cache).layers
                return True
            except CacheStateError:
                pass  # another sink, a wider window, or other layers share pages
        self.drop()  # first: two may not fit
        fill(cache, content)
        self._content, self._cache = content, copy.deepcopy(cache)
        return False

    def drop(self) -> None:
        """Let go of the cache, and of its memory now: two of 64 GiB may not fit."""
        self._content = self._cache = None
        gc.collect()

    def device_bytes(self) -> int:
        """Bytes that the kept cache holds on the device."""
        layers = [] if self._cache is None else self._cache.layers
        pages = [layer.pages for layer in layers if isinstance(layer, RetrievalLayer) and layer.pages is not None]
        return sum(p.near.nbytes() for p in pages)
