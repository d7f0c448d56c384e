"""Time of the small kernels of a decode step against their floors; `bench_paged_decode.py` has the large one.

    python benches/python/bench_kernels.py            # one CUDA device

Each figure is the median over replays of a CUDA graph with many launches, each on buffers of its own; those of the
merges together exceed the L2 cache, the others are as small in a step. Floors: bytes over the bandwidth of a plain
copy, and what a launch of a kernel that does next to nothing takes in the same graph; for the mailbox also its loads
over the bus, which nothing that asks the host can undercut.
"""

from __future__ import annotations

import json

import torch
from bench_paged_decode import D, G, H, bandwidth, captured, timed
from icecache.kernels.mailbox import mailbox_post, mailbox_wait
from icecache.kernels.merge_splits import merge_splits
from icecache.kernels.window_append import window_append

LAUNCHES = 64
NEAR_COLUMNS = 161


def merge(batch: int, splits: int) -> tuple[list, int]:
    """Return launches, and bytes that each moves in device memory."""
    calls, moved = [], 0
    for _ in range(LAUNCHES):
        out = torch.randn(batch, H, splits, G, D, device="cuda")
        lse = torch.randn(batch, H, splits, G, device="cuda")
        moved = out.nbytes + lse.nbytes + batch * H * G * (2 * D + 4)
        calls.append(lambda out=out, lse=lse: merge_splits(out, lse, torch.bfloat16))
    return calls, moved


def append(batch: int) -> tuple[list, int]:
    """Return what `merge` returns."""
    make = {"dtype": torch.bfloat16, "device": "cuda"}
    bounds = torch.tensor([[16, 16, 60]] * batch, dtype=torch.int32, device="cuda")
    calls = []
    for _ in range(LAUNCHES):
        new = [torch.randn(batch, H, 1, D, **make) for _ in range(2)]
        near = [torch.zeros(batch, H, NEAR_COLUMNS, D, **make) for _ in range(2)]
        calls.append(lambda new=new, near=near: window_append(*new, *near, bounds))
    return calls, 2 * 2 * batch * H * D * 2


def post(batch: int) -> tuple[list, int]:
    """Return launches, and bytes that each writes to the host."""
    ticket = torch.ones(1, dtype=torch.int32, device="cuda")
    calls = []
    for _ in range(LAUNCHES):
        queries = torch.randn(batch, H, G, D, dtype=torch.bfloat16, device="cuda")
        box = torch.zeros(batch, H, G, D, dtype=torch.bfloat16, pin_memory=True)
        request = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        calls.append(lambda q=queries, box=box, request=request: mailbox_post(q, box, request, ticket))
    return calls, batch * H * G * D * 2


def wait(batch: int, n_places: int) -> tuple[list, int]:
    """Return launches, answered beforehand, and bytes that each reads from the host."""
    ticket = torch.ones(1, dtype=torch.int32, device="cuda")
    calls = []
    for _ in range(LAUNCHES):
        answered = torch.ones(1, dtype=torch.int32, pin_memory=True)
        timeout = torch.zeros(1, dtype=torch.int32, pin_memory=True)
        answer = torch.zeros(batch, H, n_places, dtype=torch.int64, pin_memory=True)
        table = torch.zeros(batch, H, n_places, dtype=torch.int64, device="cuda")
        calls.append(
            lambda answered=answered, answer=answer, timeout=timeout, table=table: mailbox_wait(
                answered, answer, timeout, ticket, table
            )
        )
    return calls, batch * H * n_places * 8


def microseconds(calls: list) -> float:
    return timed(captured(calls), len(calls))


def main() -> None:
    device = bandwidth(torch.randn(1 << 28, device="cuda"))
    host = bandwidth(torch.zeros(1 << 28, dtype=torch.uint8, pin_memory=True))
    word = torch.zeros(1, device="cuda")
    launch = microseconds([lambda: word.add_(1)] * LAUNCHES)
    load = microseconds(wait(1, 1)[0]) - launch
    print(
        json.dumps(
            {
                "gpu": torch.cuda.get_device_name(),
                "device_GB_per_s": round(device / 1e9),
                "host_GB_per_s": round(host / 1e9),
                "launch_us": round(launch, 2),
                "two_loads_over_the_bus_us": round(load, 2),
            }
        )
    )
    cases = [(f"merge_splits batch {b} splits {s}", *merge(b, s), device) for b, s in ((1, 14), (1, 62), (8, 14))]
    cases += [(f"window_append batch {b}", *append(b), device) for b in (1, 8)]
    cases += [(f"mailbox_post batch {b}", *post(b), host) for b in (1, 8)]
    cases += [(f"mailbox_wait batch {b} places {k}", *wait(b, k), host) for b, k in ((1, 28), (1, 124), (8, 28))]
    for name, calls, moved, rate in cases:
        line = {"kernel": name, "us": round(microseconds(calls), 2), "bytes": moved}
        print(json.dumps({**line, "bytes_us": round(moved / rate * 1e6, 2)}), flush=True)


if __name__ == "__main__":
    main()
