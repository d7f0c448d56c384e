"""IceCache: long-context LLM inference in a small, fixed amount of GPU memory.

Importing this package loads neither torch nor transformers; the names below are resolved on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from icecache.config import IceConfig as IceConfig
    from icecache.errors import CacheStateError as CacheStateError
    from icecache.errors import CancelledError as CancelledError
    from icecache.errors import ConfigError as ConfigError
    from icecache.errors import EngineError as EngineError
    from icecache.errors import IceCacheError as IceCacheError
    from icecache.errors import IndexFormatError as IndexFormatError
    from icecache.errors import PoolExhaustedError as PoolExhaustedError
    from icecache.errors import ReadOnlyIndexError as ReadOnlyIndexError
    from icecache.errors import UnsupportedModelError as UnsupportedModelError
    from icecache.index import Filter as Filter
    from icecache.index import Index as Index
    from icecache.index import SearchResult as SearchResult
    from icecache.index import brute_force as brute_force
    from icecache.runtime import IceRuntime as IceRuntime
    from icecache.stats import RuntimeStats as RuntimeStats

_HOME = {
    "IceConfig": "icecache.config",
    "CacheStateError": "icecache.errors",
    "CancelledError": "icecache.errors",
    "ConfigError": "icecache.errors",
    "EngineError": "icecache.errors",
    "IceCacheError": "icecache.errors",
    "IndexFormatError": "icecache.errors",
    "PoolExhaustedError": "icecache.errors",
    "ReadOnlyIndexError": "icecache.errors",
    "UnsupportedModelError": "icecache.errors",
    "Filter": "icecache.index",
    "Index": "icecache.index",
    "SearchResult": "icecache.index",
    "brute_force": "icecache.index",
    "IceRuntime": "icecache.runtime",
    "RuntimeStats": "icecache.stats",
}

__all__ = [
    "CacheStateError",
    "CancelledError",
    "ConfigError",
    "EngineError",
    "Filter",
    "IceCacheError",
    "IceConfig",
    "IceRuntime",
    "Index",
    "IndexFormatError",
    "PoolExhaustedError",
    "ReadOnlyIndexError",
    "RuntimeStats",
    "SearchResult",
    "UnsupportedModelError",
    "brute_force",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    if name not in _HOME:
        msg = f"module 'icecache' has no attribute {name!r}"
        raise AttributeError(msg)
    import importlib

    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
