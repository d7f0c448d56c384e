"""The kernels of the search on a device, one by one: microseconds a layer, pages in page-locked memory.

    python benches/python/bench_page_search.py --contexts 36864 131072 307200 --out OUT.jsonl

Bytes: the scan reads summaries from the device's memory, the exact scores read keys over the bus.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from icecache.attention import StepShape
from icecache.attention.finder import FinderShape, PageFinder
from icecache.kernels.page_exact import page_exact
from icecache.kernels.page_pick import page_pick
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
    context: int, planes: int, n_pages: int, group: int, dim: int, batch: int, pool: torch.Tensor
) -> PageFinder:
    """Make a finder over random pages, as many as a context has."""
    device = torch.device("cuda")
    step = StepShape(1, batch, 8, group, dim, dim, 2 * n_pages + 2, 64, torch.bfloat16, device)
    used = context // 16
    finder = PageFinder(step, FinderShape(used + -used % 64, planes, n_pages))
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
    context: int, planes: int, n_pages: int, group: int, dim: int, batch: int, pool: torch.Tensor
) -> dict[str, object]:
    """Microseconds by kernel."""
    f = finder_of(context, planes, n_pages, group, dim, batch, pool)
    q = torch.randn(batch, 8, group, dim, device="cuda", dtype=torch.bfloat16)
    table, c = torch.zeros(batch, 8, f.step.n_pages, dtype=torch.int64, device="cuda"), f.codes
    unit, lse, words = (f._unit, f._length), f._lse, c.words
    parts = {
        "rotate": lambda: rotate_queries(q, f._rotation, *unit),
        "scan": lambda: page_scan(*unit, f._extents[0], c, f._logits, f._parts, dim**-0.5),
        "select": lambda: page_select(
            f._logits, f._parts, words, f._extents[0], f._scratch, f._chosen, f._counts, lse, slot_block=SLOT_BLOCK
        ),
        "exact": lambda: page_exact(q, words, f._chosen, f._counts, f._exact, dim**-0.5),
        "pick": lambda: page_pick(
            f._exact, f._logits, lse, words, f._chosen, f._counts, f._whole[0], table, f.host_table[0], f.host_lse[0],
            n_pages=n_pages,
        ),
        "all": lambda: f.find(0, q, table, dim**-0.5, None),
    }  # fmt: skip
    times = {name: round(graph_us(launch), 2) for name, launch in parts.items()}
    pages = batch * 8 * (context // 16)
    return {
        "context": context, "bits": planes, "n_pages": n_pages, "batch": batch, "us": times,
        "summarise_us": round(f.update_us), "pages": pages, "summary_bytes": c.nbytes(),
        "exact_bytes": batch * 8 * f._chosen.shape[1] * 16 * dim * 2,
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
