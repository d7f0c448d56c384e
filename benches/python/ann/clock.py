"""CPU time and memory of this process. CPU time, because the machine may be shared; it counts all threads."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def cpu_s(call: Callable[[], object]) -> float:
    """CPU seconds of one call."""
    start = time.process_time()
    call()
    return time.process_time() - start


def cpu_of(call: Callable[[], T]) -> tuple[float, T]:
    """CPU seconds of one call, and what it gave."""
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


def wall_s(call: Callable[[], object]) -> float:
    """Seconds of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def anonymous_bytes() -> int:
    """Anonymous resident memory, after giving freed memory back to the system.

    Mapped files do not count, so vectors that a library refers to in place are free and copies are not.
    """
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # only glibc has it
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    msg = "expected RssAnon in /proc/self/status (Linux 4.5 or later)"
    raise OSError(msg)
