"""What the GPU and the way to it are capable of, measured in a second or two."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from icecache import _core
from icecache.kernels.mailbox import mailbox_post, mailbox_wait
from icecache.transfer import MailboxShape, open_mailbox

_BYTES = 64 << 20
_LAYERS = 32


def _gigabytes_per_second(work: Callable[[], object], n_bytes: int) -> float:
    """Best of five runs after a first one."""
    best = float("inf")
    for _ in range(6):
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return n_bytes / best / 1e9


def bandwidths() -> tuple[float, float]:
    """GB/s of copies from page-locked memory to the current device, and back."""
    host = torch.zeros(_BYTES // 8, dtype=torch.int64, pin_memory=True)
    device = torch.empty_like(host, device="cuda")
    return (
        _gigabytes_per_second(lambda: device.copy_(host, non_blocking=True), _BYTES),
        _gigabytes_per_second(lambda: host.copy_(device, non_blocking=True), _BYTES),
    )


def round_trip_us() -> float:
    """Microseconds from posted queries to the answer, per layer of a CUDA graph, median of 50 replays.

    The trees hold one token, so that nothing is searched. 8 KV heads, 4 query heads each, dim 128, bfloat16.
    """
    pool, shape = _core.Pool(1), (1, 8, 4, 128)
    memory = _core.HostMemory(pool, pin="always", device=torch.cuda.current_device())
    forest = _core.Forest(_core.PageStore(128, 128, "bfloat16", memory=memory, slab_bytes=1 << 20), 8)
    mailbox, host = open_mailbox(
        _core.Engine(),
        memory,
        MailboxShape(n_layers=_LAYERS, n_rows=1, n_kv_heads=8, group=4, key_dim=128, capacity=16, dtype="bfloat16"),
    )
    for layer in range(_LAYERS):
        mailbox.bind(layer, [forest], 4, scaling=1.0)
    queries = torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
    ticket = torch.zeros(1, dtype=torch.int32, device="cuda")
    table = torch.zeros(1, 8, 16, dtype=torch.int64, device="cuda")

    def layers() -> None:
        for layer in range(_LAYERS):
            word = slice(layer, layer + 1)
            mailbox_post(queries, host.queries[layer], host.request[word], ticket)
            mailbox_wait(host.answered[word], host.table[layer], host.timeout[word], ticket, table)

    def run(work: Callable[[], None]) -> float:
        ticket.fill_(mailbox.begin_step())
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        mailbox.end_step()
        return seconds

    run(layers)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        layers()
    times = sorted(run(graph.replay) for _ in range(50))
    return times[25] / _LAYERS * 1e6
