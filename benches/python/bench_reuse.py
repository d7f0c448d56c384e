"""What `reuse=n` saves on the host: packing of a prompt and searching, by layers that share pages. CPU, op by op.

A random Llama of 6 layers (4 KV heads of dim 128, 4 query heads each) whose cache is filled with made-up keys. Rounds
take turns between the settings, and the least time of each part counts. Times are those of the processor (all threads
of the process), because the machine may be shared.

    python benches/python/bench_reuse.py --tokens 16384 --rounds 3
"""

from __future__ import annotations

import argparse
import time
from types import SimpleNamespace

import torch
from icecache import IceRuntime, stats
from icecache.bench.synthetic import Content, fill
from icecache.hf.names import cache_argument
from transformers import LlamaConfig, LlamaForCausalLM

LAYERS, KV_HEADS, GROUP, DIM = 6, 4, 4, 128
PARTS = ("index_build", "prefill_offload", "search", "transfer", "attention")
STEPS = 8


def model() -> LlamaForCausalLM:
    """Small beside its cache."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": KV_HEADS * GROUP, "num_key_value_heads": KV_HEADS, "head_dim": DIM}
    size = {"vocab_size": 256, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": LAYERS}
    return LlamaForCausalLM(LlamaConfig(**size, **heads, max_position_embeddings=1 << 20)).eval()


@torch.inference_mode()
def measure(llama: LlamaForCausalLM, n_tokens: int, reuse: int) -> dict[str, float]:
    """Milliseconds of each part: of the whole prompt, and of one step."""
    content = Content(LAYERS, 1, KV_HEADS, n_tokens, DIM, torch.float32, torch.device("cpu"), 0)
    with IceRuntime.wrap(llama, reuse=reuse, threads=1) as runtime:
        cache = runtime.new_cache()
        fill(cache, content)
        times = runtime.stats().ms
        runtime.reset_stats()
        for token in range(STEPS):
            llama(torch.tensor([[token]]), **cache_argument(cache), use_cache=True)
        spent = runtime.stats().ms
    per_step = {name: spent[name] / STEPS for name in ("search", "transfer", "attention")}
    return {"index_build": times["index_build"], "prefill_offload": times["prefill_offload"], **per_step}


def main() -> None:
    """Print one line a setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--reuse", type=int, nargs="+", default=[1, 2, 3, 6])
    args = parser.parse_args()
    torch.set_num_threads(1)
    stats.time = SimpleNamespace(perf_counter=time.process_time)  # type: ignore[assignment]
    llama, best = model(), {}
    for _ in range(args.rounds):
        for reuse in args.reuse:
            for part, ms in measure(llama, args.tokens, reuse).items():
                best[reuse, part] = min(ms, best.get((reuse, part), ms))
    print(f"{args.tokens} tokens, {LAYERS} layers; processor time in ms: first two of the prompt, others of a step")
    print("reuse  " + "  ".join(f"{part:>15}" for part in PARTS))
    for reuse in args.reuse:
        print(f"{reuse:>5}  " + "  ".join(f"{best[reuse, part]:>15.2f}" for part in PARTS))


if __name__ == "__main__":
    main()
