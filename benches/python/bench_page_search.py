"""The kernels of the search on a device, one by one: microseconds a layer, pages in page-locked memory.

    python benches/python/bench_page_search.py --contexts 36864 131072 307200 --out OUT.jsonl

Bytes: the scan reads summaries from the device's memory; `exact_bytes` of keys come over the bus, and `fine_bytes`
where the second bits lie in host memory (--bits 1). "exact, all keys" is no part of the search.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from icecache import _core
from icecache.attention import StepShape
from icecache.attention.finder import BEST_TOKENS, FinderShape, PageFinder
from icecache.kernels.page_exact import page_exact
from icecache.kernels.page_pick import page_pick
from icecache.kernels.page_refine import page_refine
from icecache.kernels.page_scan import SLOT_BLOCK, page_scan
from icecache.kernels.page_select import page_select
from icecache.kernels.rotate_queries import rotate_queries

POOL_PAGES = 1 << 16


def graph_us(launch: Callable[[], None], repeats: int = 20) -> float:
    """Microseconds of one launch within a captured graph of many, the fastest of 5 runs."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        launch()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            launch()
    best = float("inf")
    for _ in range(5):
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        began.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        best = min(best, began.elapsed_time(ended) * 1e3 / repeats)
    return best


def finder_of(
    context: int, bits: int, n_pages: int, group: int, dim: int, batch: int, pool: torch.Tensor
) -> PageFinder:
    """Make a finder over random pages, as many as a context has."""
    device = torch.device("cuda")
    step = StepShape(1, batch, 8, group, dim, dim, 2 * n_pages + 2, 64, torch.bfloat16, device)
    used = context // 16
    memory = _core.HostMemory(_core.Pool(4), pin="always")
    finder = PageFinder(step, FinderShape(used + -used % 64, bits, n_pages), memory.lend)
    rng = np.random.default_rng(0)
    units, slots = batch * 8, finder.shape.n_slots
    words = pool.data_ptr() + rng.integers(0, len(pool), units * used) * pool[0].nbytes | (0xFFFF << 48) - (1 << 64)
    places = (np.arange(units)[:, None] * slots + np.arange(used)).ravel()
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    finder.update(places, words, np.full(units, used, np.int32), np.zeros(units, bool))
    ended.record()
    ended.synchronize()
    finder.update_us = began.elapsed_time(ended) * 1e3  # type: ignore[attr-defined]
    return finder


def measure(
    context: int, bits: int, n_pages: int, group: int, dim: int, batch: int, pool: torch.Tensor
) -> dict[str, object]:
    """Microseconds by kernel."""
    f = finder_of(context, bits, n_pages, group, dim, batch, pool)
    q = torch.randn(batch, 8, group, dim, device="cuda", dtype=torch.bfloat16)
    table, c = torch.zeros(batch, 8, f.step.n_pages, dtype=torch.int64, device="cuda"), f.codes
    unit, lse, words, narrows = (f._unit, f._length), f._lse, c.words, bits == 1
    coarse = (f._coarse, f._coarse_counts) if narrows else (f._chosen, f._counts)
    scale = dim**-0.5
    parts = {
        "rotate": lambda: rotate_queries(q, f._rotation, *unit),
        "scan": lambda: page_scan(*unit, f._extents[0], c, f._logits, f._parts, scale, fine=not narrows),
        "select": lambda: page_select(
            f._logits, f._parts, words, f._extents[0], f._scratch, *coarse, lse, slot_block=SLOT_BLOCK
        ),
        "refine": lambda: page_refine(*unit, c, f._logits, lse, *coarse, f._refined, f._chosen, f._counts, scale),
        "exact": lambda: page_exact(
            q, *unit, lse, c, f._chosen, f._counts, f._exact, scale, best=BEST_TOKENS
        ),
        "exact, all keys": lambda: page_exact(q, *unit, lse, c, f._chosen, f._counts, f._exact, scale),
        "pick": lambda: page_pick(
            f._exact, f._logits, lse, words, f._chosen, f._counts, f._whole[0], table, f.host_table[0], f.host_lse[0],
            n_pages=n_pages,
        ),
        "all": lambda: f.find(0, q, table, scale, None),
    }  # fmt: skip
    if not narrows:
        del parts["refine"]
    times = {name: round(graph_us(launch), 2) for name, launch in parts.items()}
    pages = batch * 8 * (context // 16)
    return {
        "context": context, "bits": bits, "n_pages": n_pages, "batch": batch, "us": times,
        "summarise_us": round(f.update_us), "pages": pages, "summary_bytes": c.nbytes(),
        "exact_bytes": batch * 8 * f._chosen.shape[1] * BEST_TOKENS * dim * 2,
        "fine_bytes": batch * 8 * f._coarse.shape[1] * dim * 2 if narrows else 0,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs="+", default=[36864, 131072, 307200])
    parser.add_argument("--bits", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--pages", type=int, nargs="+", default=[13])
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--group", type=int, default=4)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    pool = torch.empty(POOL_PAGES, 2, 16, args.dim, dtype=torch.bfloat16, pin_memory=True)
    pool[:256].normal_()
    pool[256:].view(-1, *pool[:256].shape)[:] = pool[:256]
    device = torch.cuda.get_device_name()
    for context in args.contexts:
        for bits in args.bits:
            for n_pages in args.pages:
                for batch in args.batches:
                    line = measure(context, bits, n_pages, args.group, args.dim, batch, pool) | {"device": device}
                    print(json.dumps(line), flush=True)
                    if args.out:
                        with args.out.open("a", encoding="utf-8") as file:
                            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
