"""The name under which transformers passes the cache: ``cache`` since 5.24, ``past_key_values`` before."""

from __future__ import annotations

from collections.abc import Mapping

from transformers.cache_utils import Cache
from transformers.utils import ModelOutput

CACHE_NAMES = ("cache", "past_key_values")
"""Newest first. Models of older code keep the old name in their signature, so both are read in every version."""

CACHE_NAME = "cache" if hasattr(ModelOutput, "past_key_values") else "past_key_values"
"""The name that the installed version uses: since the renaming, outputs have the old name as a property only."""


def cache_argument(cache: Cache) -> dict[str, Cache]:
    """Keyword under which a model of transformers takes `cache`: ``model(ids, **cache_argument(cache))``."""
    return {CACHE_NAME: cache}


def stray_cache(arguments: Mapping[str, object]) -> str | None:
    """Name of an argument that is a cache but has none of the names we read; None: there is none."""
    return next((name for name, x in arguments.items() if isinstance(x, Cache) and name not in CACHE_NAMES), None)
