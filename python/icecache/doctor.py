"""`icecache doctor`: what this machine offers and what IceCache would do with it. It reports, it guesses nothing."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("torch", "transformers", "triton", "numpy")


def core() -> str:
    """State of the compiled half."""
    from icecache import _core

    return f"loaded, instruction set {_core.simd()}"


def cores() -> str:
    """Cores of the machine and of this process."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{os.cpu_count()} in the machine, {usable} for this process"


def threads() -> str:
    """Threads the index would take, and why."""
    from icecache import _core

    setting = os.environ.get("ICECACHE_NUM_THREADS")
    why = f"ICECACHE_NUM_THREADS={setting}" if setting else "cores of the affinity mask; set ICECACHE_NUM_THREADS"
    return f"{_core.Pool(None).threads} ({why})"


def memory() -> str:
    """Physical memory."""
    if not hasattr(os, "sysconf") or "SC_AVPHYS_PAGES" not in os.sysconf_names:
        return "not reported by this system"
    page = os.sysconf("SC_PAGE_SIZE")
    total, free = (os.sysconf(name) * page / 2**30 for name in ("SC_PHYS_PAGES", "SC_AVPHYS_PAGES"))
    return f"{total:.1f} GiB, {free:.1f} GiB free (reclaimable caches not counted)"


def packages() -> str:
    """Versions of what IceCache stands on."""

    def found(name: str) -> str:
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            return f"{name} not installed"

    return ", ".join([f"python {platform.python_version()}", *map(found, PACKAGES)])


def cuda() -> str:
    """CUDA devices that torch can use."""
    import torch

    if not torch.cuda.is_available():
        return "no device that torch can use"
    names = (torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return ", ".join(names)


def model() -> str:
    """Whether the shipped model loads and answers."""
    from icecache.eval.needle import load_needle, make_samples
    from icecache.eval.needle.runner import exact_match, full_attention, run_samples

    loaded, _ = load_needle()
    outcomes = run_samples(loaded, make_samples("passkey", 512, 1), {"full": full_attention})
    return "needle-3m loads and finds a passkey" if exact_match(outcomes["full"]) else "needle-3m loads, answer WRONG"


def mode() -> str:
    """Say what a wrapped model would do here, and why."""
    import torch

    if torch.cuda.is_available():
        return "model on the GPU; pages, search and selection on the CPU, selected pages cross by plain copies"
    return "everything on the CPU: no CUDA device; pages are gathered in host memory"


CHECKS: dict[str, Callable[[], str]] = {
    "system": lambda: f"{platform.system()} {platform.machine()}",
    "cores": cores,
    "memory": memory,
    "packages": packages,
    "cuda": cuda,
    "core": core,
    "threads": threads,
    "model": model,
    "mode": mode,
}


def main() -> int:
    """Print one line a check.

    Returns
    -------
    int
        0, or 1 if a check failed.
    """
    failed = False
    for name, check in CHECKS.items():
        try:
            line = check()
        except Exception as error:  # a doctor reports whatever is wrong and goes on
            failed, line = True, f"FAILED: {type(error).__name__}: {error}"
        sys.stdout.write(f"{name:<10}{line}\n")
    return int(failed)
