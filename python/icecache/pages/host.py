"""Host memory for the pages of one runtime: page-locked where a GPU reads it in place."""

from __future__ import annotations

import warnings

import torch

from icecache import _core


def host_memory(pool: _core.Pool, device: torch.device) -> _core.HostMemory | None:
    """Source of memory that `device` can read in place; None for the CPU, which needs nothing special.

    Where memory cannot be page-locked, pageable memory is used and pages are copied; this warns once.
    """
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    memory = _core.HostMemory(pool, pin="auto", device=device.index or 0)
    warn_if_pageable(memory)
    return memory


def warn_if_pageable(memory: _core.HostMemory) -> None:
    """Warn when memory that should be page-locked is not; the warning filter keeps it to once a place."""
    reason = memory.fallback_reason()
    if reason is not None:
        msg = (
            f"host memory could not be page-locked ({reason}): pages are copied through staging memory, which is "
            "slower. Free host memory, raise the limit of locked memory, or lower host_memory."
        )
        warnings.warn(msg, RuntimeWarning, stacklevel=3)
