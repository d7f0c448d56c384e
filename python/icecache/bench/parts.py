"""Where the time of a decode step goes on the device: kernels by what they are for."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

PROFILED_STEPS = 5
"""Their kernels are averaged; the profiler is loaded before."""
KERNELS = {
    "_mailbox_wait_kernel": "search",
    "_mailbox_post_kernel": "search",
    "_page_": "search",
    "_best_of_": "search",
    "_rotate_queries_kernel": "search",
    "_paged_decode_kernel": "attention and pages",
    "_merge_splits_kernel": "attention and pages",
    "_window_append_kernel": "window",
    "Memcpy": "copies",
    "Memset": "copies",
}
"""What a kernel whose name starts so is for; all others are the model's. Waiting for the host's answer is search; pages
are read over the bus by the kernel that attends to them, so the two are one part."""

Span = tuple[str, float, float]
"""Name, start and end in microseconds."""


def by_part(spans: Iterable[Span]) -> dict[str, float]:
    """Microseconds by part, and what is left between the kernels of one stream as "idle"."""
    parts = dict.fromkeys(["model", *dict.fromkeys(KERNELS.values()), "idle"], 0.0)
    covered: float | None = None
    for name, start, end in sorted(spans, key=lambda span: span[1]):
        part = next((part for prefix, part in KERNELS.items() if name.startswith(prefix)), "model")
        parts[part] += end - start
        if covered is not None:
            parts["idle"] += max(start - covered, 0.0)
        covered = end if covered is None else max(covered, end)
    return parts


def device_parts(step: Callable[[], torch.Tensor]) -> dict[str, float]:
    """Microseconds a step by part, mean over some steps; `step` decodes one token on a CUDA device.

    What passes between two steps is not in it.
    """
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]):  # loads what profiling needs
        _done(step)
    total: dict[str, float] = {}
    for _ in range(PROFILED_STEPS):
        with profile(activities=[ProfilerActivity.CUDA]) as found:
            _done(step)
        spans = [
            (event.name, float(event.time_range.start), float(event.time_range.end))
            for event in found.events() or ()
            if event.device_type.name == "CUDA"
        ]
        for part, us in by_part(spans).items():
            total[part] = total.get(part, 0.0) + us / PROFILED_STEPS
    return total


def _done(step: Callable[[], torch.Tensor]) -> None:
    step()[0, 0].item()  # sync: a token is done when its id is on the host
