"""Launch every kernel at small and odd sizes: for a memory checker, under which whole test files take too long.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/python/kernels/launch_all.py

Without the caching allocator each tensor is an allocation of its own, so that what passes its end is seen. Run it once
without the checker before: it compiles the kernels.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import icecache
from icecache.attention import DeviceStep, StepShape
from icecache.attention.finder import FinderShape, PageFinder
from paged_tools import make_slots

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Case:
    """Sizes of a decode step of one layer."""

    dtype: torch.dtype
    dim: int
    group: int
    rows: int
    slots: int
    bits: int
    softcap: float | None = None


CASES = [
    Case(torch.float32, 24, 3, 1, 34, 1, 15.0),
    Case(torch.float16, 64, 4, 2, 64, 2),
    Case(torch.bfloat16, 128, 4, 1, 1100, 1),
    Case(torch.bfloat16, 256, 1, 1, 70, 2),
    Case(torch.bfloat16, 80, 8, 3, 200, 1),
]


HEADS, PAGES = 2, 5


def step_shape(case: Case) -> StepShape:
    """Of one layer."""
    sizes = 1, case.rows, HEADS, case.group, case.dim, case.dim, 2 * PAGES + 2, 65
    return StepShape(*sizes, case.dtype, DEVICE, estimates=case.slots != 64)


def decode_step(case: Case) -> None:
    """One layer of a step whose pages are chosen on the device, the newest token in the last column."""
    heads, n_pages = HEADS, PAGES
    units, shape = case.rows * heads, step_shape(case)
    step = DeviceStep(shape, None)
    step.finder = PageFinder(shape, FinderShape(case.slots, case.bits, n_pages))
    if DEVICE.type == "cuda" and case.bits == 1:  # as in a runtime: the second bits in host memory
        step.finder.codes.fine = step.finder.codes.fine.cpu().pin_memory()
    made = make_slots(units, case.slots, case.dim, case.dtype)
    made.memory[:, 1] = 0.5  # values; keys of dead slots stay NaN
    words = made.codes.words.cpu().numpy()
    columns = step.near_keys.shape[3]
    bounds = torch.tensor([[16, 16 + b, columns - b] for b in range(case.rows)], dtype=torch.int32)
    step.bounds.copy_(bounds)
    whole = torch.zeros(units, dtype=torch.bool).numpy()
    extents = torch.full((units,), case.slots, dtype=torch.int32).numpy()
    step.finder.update(torch.arange(len(words)).numpy(), words, extents, whole)
    new = [torch.randn(case.rows, heads, 1, case.dim).to(DEVICE, case.dtype) for _ in range(2)]
    query = torch.randn(case.rows, heads * case.group, 1, case.dim).to(DEVICE, case.dtype)
    out = step.attend(0, query, *new, case.dim**-0.5, case.softcap)
    # A dead slot of a page has a NaN key: one that is attended to shows here.
    assert out.isfinite().all(), case
    assert (step.table != 0).sum() == units * n_pages, case


def mailbox() -> None:
    """A post, an answer that is there, and one that never comes."""
    from icecache.kernels.mailbox import mailbox_post, mailbox_wait

    pinned = DEVICE.type == "cuda"
    for shape in ((1, 8, 4, 128), (3, 2, 7, 80)):
        box, request = torch.zeros(shape, pin_memory=pinned), torch.zeros(1, dtype=torch.int32, pin_memory=pinned)
        ticket = torch.full((1,), 7, dtype=torch.int32).to(DEVICE)
        mailbox_post(torch.randn(shape).to(DEVICE), box, request, ticket)
        answer = torch.zeros(shape[0], shape[1], 5, dtype=torch.int64, pin_memory=pinned)
        table, timeout = torch.zeros_like(answer).to(DEVICE), torch.zeros_like(request, pin_memory=pinned)
        words = [torch.full((1,), answered, dtype=torch.int32, pin_memory=pinned) for answered in (7, 6)]
        for word in words:
            mailbox_wait(word, answer, timeout, ticket, table, max_polls=20)
        if pinned:
            torch.cuda.synchronize()
        assert timeout.item() == 7


def later_chunk() -> None:
    """Tokens of pages laid one behind the other, and attention of a chunk to them."""
    from icecache.kernels.fold_part import fold_part
    from icecache.kernels.page_gather import page_gather
    from icecache.kernels.part_attention import part_attention

    for dim, dtype in ((24, torch.float32), (128, torch.float16)):
        made = make_slots(2, 9, dim, dtype, empty=0.0)
        made.memory[:, 1] = 0.5
        ends = made.live.sum(2).cumsum(1)
        n_tokens = int(ends[:, -1].min())
        starts = (ends - made.live.sum(2)).to(DEVICE, torch.int32).flatten()
        spans = [[9 * head, 9 * head + int((ends[head] < n_tokens).sum()) + 1] for head in range(2)]
        keys, values = (torch.empty(2, n_tokens, dim, dtype=dtype).to(DEVICE) for _ in range(2))
        bounds = torch.tensor(spans, dtype=torch.int32).to(DEVICE)
        page_gather(made.codes.words, starts, bounds, keys, values, 0, programs=6)
        query = torch.randn(2, 3, 21, dim).to(DEVICE, dtype)
        out, lse = part_attention(query, keys, values, 0.125, causal=True)
        fold_part(query, torch.zeros_like(lse), out, lse)
        assert out.isfinite().all()


def prompt_sums() -> None:
    """What H2O sums over a prompt."""
    from icecache.kernels.attention_sums import attention_sums

    for dim, n_queries, n_keys in ((16, 33, 70), (24, 1, 5)):
        query, keys = torch.randn(1, 2, 3, n_queries, dim).to(DEVICE), torch.randn(1, 2, n_keys, dim).to(DEVICE)
        valid = torch.ones(1, n_keys, dtype=torch.bool).to(DEVICE)
        assert attention_sums(query, keys, valid, 0.2, None).isfinite().all()


Run = Callable[..., object]


@contextmanager
def wrapped_kernels(wrap: Callable[[str, Run], Run]) -> Iterator[None]:
    """Give every kernel another `run` inside."""
    kernels = []
    for path in sorted(Path(icecache.__file__).with_name("kernels").glob("*.py")):
        module = importlib.import_module(f"icecache.kernels.{path.stem}")
        for name, kernel in vars(module).items():
            if name.endswith("_kernel") and hasattr(kernel, "run"):
                kernel.run = wrap(name, kernel.run)
                kernels.append(kernel)
    try:
        yield
    finally:
        for kernel in kernels:
            del kernel.run


@contextmanager
def counted_launches() -> Iterator[Counter[str]]:
    """Count how often each kernel is launched inside; all are listed."""
    counts: Counter[str] = Counter()

    def wrap(name: str, run: Run) -> Run:
        counts[name] = 0

        def counted(*args: object, **kwargs: object) -> object:
            counts[name] += 1
            return run(*args, **kwargs)

        return counted

    with wrapped_kernels(wrap):
        yield counts


def launches(cases: list[Case]) -> Iterator[str]:
    """Launch everything; yields what was done."""
    for case in cases:
        decode_step(case)
        yield str(case)
    mailbox()
    yield "mailbox"
    later_chunk()
    yield "a later chunk of a prompt"
    prompt_sums()
    yield "sums over a prompt"


def main() -> int:
    """Exit status 1 if a kernel was left out."""
    began = time.monotonic()
    with counted_launches() as counts:
        for done in launches(CASES):
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            print(f"{time.monotonic() - began:6.1f} s  {done}", flush=True)
    print(", ".join(f"{name} {n}" for name, n in counts.items()))
    missing = [name for name, n in counts.items() if n == 0]
    print(f"never launched: {', '.join(missing)}" if missing else "every kernel was launched")
    return bool(missing)


if __name__ == "__main__":
    sys.exit(main())
