"""Errors a user can meet. Every message names the value that came and what was expected."""

from __future__ import annotations


class IceCacheError(Exception):
    """Base class of every error raised on purpose by IceCache."""


class ConfigError(IceCacheError, ValueError):
    """A setting is out of range, or two settings contradict each other."""


class UnsupportedModelError(IceCacheError, RuntimeError):
    """The model's attention cannot be served; the message names the layer and the reason."""


class CacheStateError(IceCacheError, RuntimeError):
    """A KV cache is used where it does not belong: after ``unwrap``, by another model, or after a broken step."""


class BadTensorError(IceCacheError, ValueError):
    """A key, value or query holds NaN or infinity, or has a dtype, device or shape that does not fit its cache."""


class IndexFormatError(IceCacheError, ValueError):
    """Bytes or a file that are no index of this version: cut short, corrupted or foreign."""


class DataError(IceCacheError, ValueError):
    """Evaluation data or results that are missing, in another format than expected, or from another run."""


class EngineError(IceCacheError, RuntimeError):
    """A decode step failed in the search workers: a panic, an overrun. The next step may work."""


class SearchMemoryError(EngineError):
    """Page summaries do not fit the device, or `search_memory`: the host can search instead.

    Attributes
    ----------
    needed_bytes, available_bytes : int or None
        What they need and what there is, where known.
    """

    def __init__(self, message: str, *, needed_bytes: int | None = None, available_bytes: int | None = None) -> None:
        super().__init__(message)
        self.needed_bytes, self.available_bytes = needed_bytes, available_bytes


class ReadOnlyIndexError(IceCacheError, TypeError):
    """A snapshot or a memory-mapped index was asked to change; ``copy()`` gives one that can."""


class CancelledError(IceCacheError, RuntimeError):
    """A progress callback returned False; the index is unchanged."""


class PoolExhaustedError(IceCacheError, MemoryError):
    """Host memory for pages is used up. The sequence stays as it was before the step.

    Attributes
    ----------
    needed_bytes, available_bytes : int or None
        What the step asked for and what was left, where known.
    """

    def __init__(self, message: str, *, needed_bytes: int | None = None, available_bytes: int | None = None) -> None:
        super().__init__(message)
        self.needed_bytes, self.available_bytes = needed_bytes, available_bytes
