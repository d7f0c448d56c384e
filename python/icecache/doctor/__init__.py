"""`icecache doctor`: what this machine offers and what IceCache would do with it. It reports, it guesses nothing."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version

_EAGER = "model on the GPU op by op, search on the CPU between kernels, selected pages copied"
PACKAGES = ("torch", "transformers", "triton", "numpy")


def core() -> str:
    """State of the compiled half."""
    from icecache import _core

    return f"loaded, instruction set {_core.simd()}"


def cores() -> str:
    """Cores of the machine and of this process."""
    from icecache import _core

    usable, physical, nodes = _core.topology()
    numa = f"{nodes} NUMA node" + ("s" if nodes > 1 else "")
    return f"{os.cpu_count()} in the machine; for this process {usable}, {physical} of them physical, on {numa}"


def workers() -> str:
    """Search workers that a step on a GPU would have, and why."""
    from icecache import _core

    n = _core.default_workers()
    if n:
        return f"{n} that poll while a step is in flight, bound to cores; the other cores launch and insert"
    return "0: with fewer than 4 cores, polling workers would starve the thread that launches the model"


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


def locked_memory() -> str:
    """How much memory may be page-locked."""
    try:
        import resource
    except ImportError:  # not on Windows
        return "limit not reported by this system"
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    text = "unlimited" if limit == resource.RLIM_INFINITY else f"{limit / 2**20:.0f} MiB"
    return f"limit of this process {text} (ulimit -l); CUDA's own page-locking is bounded by free memory instead"


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
    from icecache.eval.needle.runner import as_prompt, ask
    from icecache.eval.prefill import prefill

    loaded, tokenizer = load_needle()
    samples = make_samples("passkey", 512, 1)
    cache = prefill(loaded, [as_prompt(samples[0])], "B").cache
    (outcome,) = ask(loaded, tokenizer, samples, cache)
    return "needle-3m loads and finds a passkey" if outcome.exact_match else "needle-3m loads, answer WRONG"


def bus() -> str:
    """Bandwidth between page-locked memory and the GPU."""
    import torch

    if not torch.cuda.is_available():
        return "no GPU to measure"
    from icecache.doctor.gpu import bandwidths

    to_device, to_host = bandwidths()
    return f"{to_device:.0f} GB/s from page-locked memory to the GPU, {to_host:.0f} GB/s back"


def mailbox() -> str:
    """Time of a question to a search worker from inside a CUDA graph."""
    import torch

    from icecache import _core

    if not torch.cuda.is_available():
        return "no GPU to measure"
    if not _core.default_workers():
        return "not measured: no search workers on this machine"
    from icecache.doctor.gpu import round_trip_us

    return f"{round_trip_us():.1f} us a layer in a CUDA graph, without a search"


def mode() -> str:
    """Say what a wrapped model would do here, and why."""
    import importlib.util

    import torch

    from icecache import _core

    if not torch.cuda.is_available():
        return "everything on the CPU: no CUDA device; pages are gathered in host memory"
    if torch.version.hip is not None:
        return f"{_EAGER}: captured steps are for CUDA devices"
    if importlib.util.find_spec("triton") is None:
        return f"{_EAGER}: triton is not installed"
    memory = _core.HostMemory(_core.Pool(1), pin="auto", device=torch.cuda.current_device())
    _core.PageStore(128, 128, "bfloat16", memory=memory, slab_bytes=1 << 20).reserve(1 << 20)
    return captured_mode(_core.default_workers(), memory.fallback_reason())


def captured_mode(n_workers: int, pageable: str | None) -> str:
    """Say who searches for captured steps; `pageable` is why memory is not page-locked, None: it is."""
    if pageable is not None:
        return f"{_EAGER}: memory is not page-locked ({pageable})"
    host = f"{n_workers} workers on the CPU" if n_workers else "nobody: too few cores, steps are run op by op then"
    return (
        "one CUDA graph a token; summaries of the pages are searched on the GPU, which reads pages in place from "
        f'page-locked memory. Where summaries do not fit, and with search="cpu", searched by {host}'
    )


CHECKS: dict[str, Callable[[], str]] = {
    "system": lambda: f"{platform.system()} {platform.machine()}",
    "cores": cores,
    "workers": workers,
    "memory": memory,
    "locked": locked_memory,
    "packages": packages,
    "cuda": cuda,
    "bus": bus,
    "mailbox": mailbox,
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
