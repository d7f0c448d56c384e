"""Time of the paged decode kernel against the bandwidth it has: the device's memory, or the bus to the host's.

    python benches/python/bench_paged_decode.py            # one CUDA device

Each figure is the median over replays of a CUDA graph with one launch per page set; the sets together exceed the L2
cache, so pages in device memory are read from memory. The floor is bytes over bandwidth, measured by plain copies.
"""

from __future__ import annotations

import json
import statistics

import torch
from icecache.kernels.paged_decode import page_words, paged_decode

H, G, D, NEAR = 8, 4, 128, 64
SETS = 16
REPLAYS = 20


def timed(graph: torch.cuda.CUDAGraph, launches: int) -> float:
    """Microseconds a launch, median."""
    times = []
    for _ in range(REPLAYS):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) * 1e3 / launches)
    return statistics.median(times)


def captured(calls: list) -> torch.cuda.CUDAGraph:
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def bandwidth(source: torch.Tensor) -> float:
    """Bytes a second of a plain copy to the device."""
    target = torch.empty_like(source, device="cuda")
    graph = captured([lambda: target.copy_(source, non_blocking=True)])
    # A copy within the device reads and writes there.
    moved = source.nbytes * (2 if source.is_cuda else 1)
    return moved / timed(graph, 1) * 1e6


def run(batch: int, n_places: int, pool: torch.Tensor, num_warps: int, page_splits: int | None) -> float:
    generator = torch.Generator().manual_seed(0)
    make = {"dtype": torch.bfloat16, "device": "cuda"}
    q = torch.randn(batch, H, G, D, **make)
    near = [torch.randn(batch, H, NEAR + 96, D, **make) for _ in range(2)]
    bounds = torch.tensor([[16, 16, NEAR]] * batch, dtype=torch.int32, device="cuda")
    calls = []
    for _ in range(SETS):
        table = torch.randint(len(pool), (batch, H, n_places), generator=generator)
        words = page_words(pool, table, torch.full_like(table, 16)).cuda()
        calls.append(
            lambda words=words: paged_decode(
                q, *near, bounds, words, D**-0.5, page_splits=page_splits, num_warps=num_warps
            )
        )
    return timed(captured(calls), SETS)


def main() -> None:
    n_pages = (1 << 30) // (2 * 16 * D * 2)
    device_pool = torch.randn(n_pages, 2, 16, D, dtype=torch.bfloat16, device="cuda")
    host_pool = torch.empty(n_pages, 2, 16, D, dtype=torch.bfloat16, pin_memory=True).copy_(device_pool)
    pools = {"device": device_pool, "host": host_pool}
    rates = {name: bandwidth(pool) for name, pool in pools.items()}
    print(json.dumps({"gpu": torch.cuda.get_device_name(), "GB_per_s": {k: round(v / 1e9) for k, v in rates.items()}}))
    for batch, n_places in ((1, 1), (1, 13), (1, 61), (4, 13), (8, 13)):
        for where, pool in pools.items():
            paged, near = batch * H * n_places * 2 * 16 * D * 2, batch * H * NEAR * 2 * D * 2
            floor = paged / rates[where] + near / rates["device"]
            line = {"batch": batch, "pages": n_places, "where": where, "floor_us": round(floor * 1e6, 1)}
            for num_warps, splits in ((1, None), (2, None), (4, None), (4, 7), (4, 16)):
                us = run(batch, n_places, pool, num_warps, splits)
                line[f"warps={num_warps},splits={splits or 'page'}"] = round(us, 1)
            print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
