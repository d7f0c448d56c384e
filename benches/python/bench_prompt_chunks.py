"""Time to the first and to the second token of a prompt computed in chunks, and the most memory that takes.

    python benches/python/bench_prompt_chunks.py ice:16384:4096 hf:16384:4096 ice:131072:8192 ice:307200:8192x4

A case is METHOD:TOKENS:CHUNK, with xLAYERS behind for a model of fewer layers than Llama-3.1-8B has (random weights,
bfloat16, seed 0, batch 1). Methods: `ice` (budget 256) and `hf` (sdpa, DynamicCache), both by calls of the model with
one cache, the logits of the last token only. Each case begins with a prompt of two chunks and two tokens that are not
timed. Times are of the host, the device waited for. `again` repeats the case with a new cache: what is reserved and
planned at first use is there then. Needs a CUDA device.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from dataclasses import replace

import torch
from icecache import IceRuntime
from icecache.bench.cells import machine
from icecache.bench.shapes import SHAPES, random_model
from icecache.hf.names import cache_argument
from transformers import DynamicCache

SHAPE = "llama-3.1-8b"
TWICE_BELOW = 70_000
"""Tokens below which a case is repeated."""


def prompt(model, cache, ids: torch.Tensor, chunk: int) -> dict[str, float]:
    """Seconds to the first and to the second token, and of each chunk."""
    torch.cuda.synchronize()
    began, ends = time.perf_counter(), []
    for first in range(0, ids.shape[1], chunk):
        piece = ids[:, first : first + chunk]
        logits = model(piece, **cache_argument(cache), use_cache=True, logits_to_keep=1).logits
        ends.append(time.perf_counter() - began)
    token = logits[:, -1:].argmax(-1)
    torch.cuda.synchronize()
    first_token = time.perf_counter() - began
    model(token, **cache_argument(cache), use_cache=True).logits[:, -1].argmax(-1).item()
    second_token = time.perf_counter() - began
    steps = [round(b - a, 3) for a, b in zip([0.0, *ends], ends, strict=False)]
    return {"ttft_s": round(first_token, 3), "tt2t_s": round(second_token, 3), "chunks_s": steps[:3] + steps[-3:]}


def run(model, method: str, n_tokens: int, chunk: int) -> dict[str, object]:
    generator = torch.Generator("cuda").manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (1, n_tokens), generator=generator, device="cuda")
    runtime = IceRuntime.wrap(model, budget=256) if method == "ice" else None
    new_cache = runtime.new_cache if runtime is not None else lambda: DynamicCache(config=model.config)
    line: dict[str, object] = {}
    try:
        short = new_cache()
        prompt(model, short, ids[:, : 2 * chunk], chunk)
        model(ids[:, :1], **cache_argument(short), use_cache=True)
        del short
        for name in ("first", "again") if n_tokens < TWICE_BELOW else ("first",):
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            cache = new_cache()
            line[name] = prompt(model, cache, ids, chunk)
            line["peak_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
            line["peak_beyond_before_gib"] = round((torch.cuda.max_memory_allocated() - before) / 2**30, 2)
            if runtime is not None:
                stats = runtime.stats()
                line["host_gib"] = round(stats.host_bytes / 2**30, 2)
                line["ms"] = {k: round(v) for k, v in stats.ms.items() if v >= 1}
                runtime.reset_stats()
            del cache
    finally:
        if runtime is not None:
            runtime.unwrap()
    return line


def main() -> None:
    print(json.dumps(machine(torch.device("cuda"))), flush=True)
    # cuDNN plans each new length anew, which costs Hugging Face's side 2 ms a layer: off, for its own good.
    torch.backends.cuda.enable_cudnn_sdp(False)
    models: dict[int, object] = {}
    for case in sys.argv[1:]:
        method, n_tokens, chunk = case.split(":")
        chunk, _, layers = chunk.partition("x")
        n_layers = int(layers or SHAPES[SHAPE].num_hidden_layers)
        if n_layers not in models:
            models.clear()
            gc.collect()
            torch.cuda.empty_cache()
            SHAPES["chosen"] = replace(SHAPES[SHAPE], num_hidden_layers=n_layers)
            models[n_layers] = random_model("chosen", torch.device("cuda"), torch.bfloat16, max_tokens=400_000, seed=0)
        line: dict[str, object] = {"case": case, "layers": n_layers}
        torch.backends.cuda.enable_cudnn_sdp(method == "ice")
        try:
            with torch.inference_mode():
                line |= run(models[n_layers], method, int(n_tokens), int(chunk))
        except (torch.OutOfMemoryError, MemoryError) as error:
            line["error"] = str(error).splitlines()[0][:200]
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
