"""Attention mass that a search among page summaries loses against exact scores of all pages, on needle-3m's queries.

    python benches/python/bench_summaries.py --length 16384 --samples 2 --tasks chase8 gsm kv_dense kv_rand

Contexts are prefilled densely; question and answer run under a budget of 256, and some queries of all layers and
heads are kept with the pages there are. Ways: `means` as the host ranks (mean + .25 radius, without its int8 rounding),
`1` and `2` bits as the device does.
"""

from __future__ import annotations

import argparse

import numpy as np
import torch
from icecache import IceRuntime, _core
from icecache.eval.needle import load_needle, make_samples
from icecache.eval.needle.runner import ask
from icecache.hf.names import cache_argument
from icecache.kernels.page_codes import decoded, empty_codes, page_codes_ref, rotation_matrix
from icecache.kernels.page_exact import page_exact_ref
from icecache.kernels.page_scan import REACH, page_scan_ref
from icecache.pages import as_bytes
from icecache.select import Request, TreeSearch
from transformers import DynamicCache

MEAN_REACH = 0.25


class Recorder:
    """Keeps the queries that a search is asked, and the pages of its first step."""

    def __init__(self, every: int) -> None:
        self.every, self.steps = every, 0
        self.seen: dict[tuple[int, int, int], tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], float]] = {}

    def __call__(self, request: Request) -> None:
        """Look at one request of one layer."""
        first = not any(layer == request.layer for layer, _, _ in self.seen)
        self.steps += request.layer == 0
        for row, forest in enumerate(request.forests if first else ()):
            keys, values = (
                torch.empty(forest.n_kv_heads, len(forest), dim, dtype=request.dtype)
                for dim in (request.key_dim, request.value_dim)
            )
            forest.read(0, len(forest), as_bytes(keys), as_bytes(values))
            places = torch.from_numpy(_core.all_pages([forest]).positions()[0]).long()
            for head in range(forest.n_kv_heads):
                at = places[head][(places[head] >= 0).any(1)]
                self.seen[request.layer, row, head] = keys[head][at.clamp(min=0)].float(), at >= 0, [], request.scaling
        if self.steps % self.every == 0:
            for (layer, row, head), kept in self.seen.items():
                if layer == request.layer:
                    kept[2].append(torch.from_numpy(np.array(request.queries[row, head])))


def estimates(keys: torch.Tensor, live: torch.Tensor, queries: torch.Tensor, scaling: float) -> dict[str, torch.Tensor]:
    """Log-sum-exp (Q, G, N) of all pages by way; keys (N, 16, D), queries (Q, G, D)."""
    n, dim = live.sum(1), keys.shape[2]
    masked = torch.where(live[..., None], keys, 0.0)
    mean = masked.sum(1) / n[:, None]
    radius = torch.where(live, (keys - mean[:, None]).norm(dim=-1), 0.0).amax(1)
    length = queries.norm(dim=-1, keepdim=True)
    ways = {"means": (queries @ mean.T + MEAN_REACH * length * radius) * scaling + n.log()}
    words = (live.long() << torch.arange(48, 64)).sum(1) | 1
    slots, rotation = torch.arange(len(keys)), rotation_matrix(dim, torch.device("cpu"))
    for planes in (1, 2):
        codes = empty_codes(len(keys), planes, dim, torch.device("cpu"))
        page_codes_ref(codes, slots, words, rotation, masked)
        keys_again, distance = decoded(codes, slots)[None], codes.numbers[2][None]
        found = [
            page_scan_ref(q[None], rotation, keys_again, distance, words[None], scaling, reach=REACH[planes - 1])[0]
            for q in queries
        ]
        ways[str(planes)] = torch.stack(found)
    return ways


def lost(estimate: torch.Tensor, share: torch.Tensor, n_candidates: int, n_pages: int) -> float:
    """Mean mass a head that `n_pages` of the best `n_candidates` (0: no second stage) hold less than the best pages."""
    weight = torch.softmax(estimate, -1).sum(0)
    picked = weight.topk(min(n_candidates or n_pages, len(weight))).indices
    best = share.sum(0).topk(min(n_pages, len(weight))).values.sum()
    kept = share.sum(0)[picked].topk(min(n_pages, len(picked))).values.sum()
    return float(best - kept) / len(share)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--tasks", nargs="+", default=["chase8", "gsm", "kv_dense", "kv_rand"])
    parser.add_argument("--pages", type=int, default=13)
    parser.add_argument("--candidates", type=int, nargs="+", default=[0, 32, 48, 96, 112, 312])
    parser.add_argument("--every", type=int, default=12, help="steps from one that is looked at to the next")
    parser.add_argument("--seed", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_needle("cpu", torch.float32)
    read = TreeSearch.read
    for task in args.tasks:
        recorder = Recorder(args.every)
        batch = make_samples(task, args.length, args.samples, seed=args.seed, rows_per_seed=args.samples)

        def recording(self, services, request, recorder=recorder):  # type: ignore[no-untyped-def]
            recorder(request)
            return read(self, services, request)

        with torch.inference_mode():
            cache = DynamicCache(config=model.config)
            tokens = torch.tensor([sample.context for sample in batch])
            model(tokens, **cache_argument(cache), use_cache=True, logits_to_keep=1)
            TreeSearch.read = recording  # type: ignore[method-assign]
            try:
                with IceRuntime.wrap(model, budget=256) as runtime:
                    ask(model, tokenizer, batch, runtime.adopt(cache))
            finally:
                TreeSearch.read = read  # type: ignore[method-assign]
        losses: dict[tuple[str, int], list[float]] = {}
        for keys, live, kept, scaling in recorder.seen.values():
            queries = torch.stack(kept)
            ways = estimates(keys, live, queries, scaling)
            for i, query in enumerate(queries):
                masked = torch.where(live[..., None], keys, 0.0)
                share = torch.softmax(page_exact_ref(query[None], masked[None], live[None], scaling)[0].T, -1)
                for way, estimate in ways.items():
                    for c in args.candidates:
                        losses.setdefault((way, c), []).append(lost(estimate[i], share, c, args.pages))
        for (way, c), values in losses.items():
            print(f"{task:10} {way:>6} {c:4} candidates: {np.mean(values):.4f}  ({len(values)} queries)", flush=True)


if __name__ == "__main__":
    main()
