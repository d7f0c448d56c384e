"""Attention of a chunk of a prompt to a long past in host pages: its parts against the bus and the processors.

    python benches/python/bench_chunk_attention.py            # one CUDA device, about a minute

Heads of Llama-3.1-8B (8 KV heads of 128, 4 query heads each), bfloat16. `gather`: tokens out of page-locked pages, GB/s
beside a plain copy. `attention`: TFLOP/s of our kernel by tile and of the kernels in torch. `both`: milliseconds of a
piece gathered on a stream of its own while another one is attended to, beside each alone. Medians of CUDA events; every
operand exceeds the L2 cache.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable

import torch
from icecache.kernels.page_gather import page_gather
from icecache.kernels.part_attention import part_attention

H, G, D = 8, 4, 128
REPEATS = 5
MAKE = {"dtype": torch.bfloat16, "device": "cuda"}


def timed(call: Callable[[], object], repeats: int = REPEATS) -> float:
    """Milliseconds, median."""
    call()
    times = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def say(**line: object) -> None:
    print(json.dumps(line), flush=True)


def pages_of(n_tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Full pages in page-locked memory in a random order: memory, words, starts and spans of all of them."""
    n = n_tokens // 16
    memory = torch.zeros(H * n, 2, 16, D, dtype=torch.bfloat16, pin_memory=True)
    order = torch.randperm(H * n, generator=torch.Generator().manual_seed(0))
    words = (0xFFFF << 48) - (1 << 64) | memory.data_ptr() + order * memory[0].numel() * 2
    starts = (torch.arange(n) * 16).repeat(H).int()
    spans = torch.tensor([[h * n, (h + 1) * n] for h in range(H)], dtype=torch.int32)
    return memory, words.cuda(), starts.cuda(), spans.cuda()


def gather(n_tokens: int) -> Callable[[], None]:
    memory, words, starts, spans = pages_of(n_tokens)
    keys, values = (torch.empty(H, n_tokens, D, **MAKE) for _ in range(2))
    target = torch.empty_like(memory, device="cuda")
    rate = memory.nbytes / timed(lambda: target.copy_(memory, non_blocking=True)) / 1e6
    say(what="copy", gb_per_s=round(rate, 1))
    for programs, at_once, warps in (
        (8, 8, 16),
        (16, 4, 8),
        (16, 8, 16),
        (16, 8, 8),
        (32, 4, 8),
        (32, 8, 16),
        (64, 8, 16),
    ):
        options = {"programs": programs, "pages_at_once": at_once, "num_warps": warps}
        ms = timed(lambda options=options: page_gather(words, starts, spans, keys, values, 0, **options))
        say(what="gather", **options, gb_per_s=round(memory.nbytes / ms / 1e6, 1))
    held = memory  # pages are read by address: they live as long as the call

    def call() -> None:
        assert held is memory
        page_gather(words, starts, spans, keys, values, 0)

    return call


def kernels(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> dict[str, Callable[[], object]]:
    scale = D**-0.5
    wide = [t[:, None].expand(H, G, -1, D) for t in (k, v)]
    aten = torch.ops.aten
    calls: dict[str, Callable[[], object]] = {
        "flash": lambda: aten._scaled_dot_product_flash_attention(q, *wide, 0.0, causal, scale=scale),
        "cudnn": lambda: aten._scaled_dot_product_cudnn_attention(q, *wide, None, True, 0.0, causal, scale=scale),
    }
    folded = q.reshape(1, H, -1, D)
    if not causal:
        plain = [t[None] for t in (k, v)]
        calls["flash folded"] = lambda: aten._scaled_dot_product_flash_attention(folded, *plain, scale=scale)
        calls["cudnn folded"] = lambda: aten._scaled_dot_product_cudnn_attention(
            folded, *plain, None, True, scale=scale
        )
    onto = part_attention(q, k, v, scale, causal=causal)
    for tile in ((128, 64, 8, 3), (128, 64, 4, 2), (128, 128, 8, 2), (128, 128, 8, 3), (64, 64, 4, 3), (64, 128, 4, 2)):
        calls[f"ours {tile}"] = lambda tile=tile: part_attention(
            q, k, v, scale, causal=causal, tile=tile, onto=None if causal else onto
        )
    return calls


def attention(n_queries: int, n_keys: int, causal: bool) -> None:
    q = torch.randn(H, G, n_queries, D, **MAKE)
    k, v = (torch.randn(H, n_keys, D, **MAKE) for _ in range(2))
    flop = 4 * H * G * D * n_queries * n_keys * (0.5 if causal else 1.0)
    truth = None
    for name, call in kernels(q, k, v, causal).items():
        line: dict[str, object] = {"queries": n_queries, "keys": n_keys, "causal": causal, "kernel": name}
        try:
            first = call()
            out, lse = (t.float() for t in (first[0], first[1]))  # type: ignore[index]
            if truth is None:
                truth = out.clone(), lse.view(H, G, -1)[..., :n_queries].clone()
            else:
                line["off_out"] = round(float((out.reshape(truth[0].shape) - truth[0]).abs().max()), 5)
                line["off_lse"] = round(
                    float((lse.reshape(-1)[: truth[1].numel()] - truth[1].flatten()).abs().max()), 5
                )
            ms = timed(call, 3)
            line |= {"ms": round(ms, 3), "tflops": round(flop / ms / 1e9, 1)}
        except Exception as error:  # a kernel that cannot do it is a result
            line["error"] = str(error).splitlines()[0][:150]
        say(what="attention", **line)


def both(bring: Callable[[], None], n_queries: int, n_keys: int) -> None:
    q = torch.randn(H, G, n_queries, D, **MAKE)
    k, v = (torch.randn(H, n_keys, D, **MAKE) for _ in range(2))
    calls = kernels(q, k, v, causal=False)
    for priority in (0, -1):
        side = torch.cuda.Stream(priority=priority)

        def together(attend: Callable[[], object], side: torch.cuda.Stream = side) -> None:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                bring()
            attend()
            torch.cuda.current_stream().wait_stream(side)

        for name in ("flash", "cudnn", "ours (128, 64, 8, 3)", "ours (128, 128, 8, 2)"):
            try:
                line = {
                    "gather_ms": round(timed(bring), 3),
                    "attention_ms": round(timed(calls[name]), 3),
                    "both_ms": round(timed(lambda call=calls[name]: together(call)), 3),
                }
            except Exception as error:
                line = {"error": str(error).splitlines()[0][:150]}
            say(what="both", kernel=name, priority=priority, queries=n_queries, keys=n_keys, **line)


def new_lengths() -> None:
    """Time the first call with another number of keys."""
    q, wide = torch.randn(1, 32, 4096, D, **MAKE), torch.randn(2, 1, 32, 16384, D, **MAKE)
    aten = torch.ops.aten
    calls = {
        "flash": lambda n: aten._scaled_dot_product_flash_attention(q, wide[0, :, :, :n], wide[1, :, :, :n]),
        "cudnn": lambda n: aten._scaled_dot_product_cudnn_attention(
            q, wide[0, :, :, :n], wide[1, :, :, :n], None, True
        ),
    }
    for name, call in calls.items():
        call(8000)
        known = timed(lambda call=call: call(8000), 1)
        fresh = [timed_once(lambda call=call, n=n: call(n)) for n in (8001, 8003, 8016)]
        say(what="another length", kernel=name, known_ms=round(known, 2), fresh_ms=[round(ms, 2) for ms in fresh])


def timed_once(call: Callable[[], object]) -> float:
    start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    call()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


def main() -> None:
    say(gpu=torch.cuda.get_device_name(), torch=torch.__version__)
    bring = gather(32768)
    attention(4096, 16384, causal=False)
    attention(8192, 32768, causal=False)
    attention(8192, 8192, causal=True)
    both(bring, 8192, 32768)
    both(bring, 4096, 32768)
    new_lengths()


if __name__ == "__main__":
    main()
