"""Attention mass that a search among page summaries loses against exact scores of all pages, on needle models' queries.

    python benches/python/bench_summaries.py --length 16384 --samples 2 --tasks chase8 gsm kv_dense kv_rand
    python benches/python/bench_summaries.py --model benches/models/needle-qwen3 --tasks kv_dense --pages 2

Contexts are prefilled densely; question and answer run under a budget of 256, and some queries of all layers and
heads are kept with the pages there are. Ways: `means` as the host ranks (mean + .25 radius, without its int8 rounding),
candidates scored from all keys; `2 bits` as the device does with both bits there, from all keys of a candidate or its
best; `1 bit` as it does for long contexts: four times as many candidates by signs, of them the candidates by both bits.
Behind the mean stands how many of 1000 queries lose more than .05 of one head's mass: a lost answer is one such query.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import numpy as np
import torch
from icecache.attention.finder import BEST_TOKENS, COARSE
from icecache.eval.needle import load_needle, make_samples
from icecache.kernels.page_codes import decoded, empty_codes, page_codes_ref, rotation_matrix
from icecache.kernels.page_exact import page_best_ref, page_exact_ref
from icecache.kernels.page_pick import page_pick_ref
from icecache.kernels.page_refine import page_refine_ref
from icecache.kernels.page_scan import REACH, page_scan_ref
from icecache.select import Request
from requests_seen import Place, answer, page_keys, prefill
from transformers import AutoModelForCausalLM

MEAN_REACH = 0.25


class Recorder:
    """Keeps the queries that a search is asked, and the pages of its first step."""

    def __init__(self, every: int) -> None:
        self.every, self.steps = every, 0
        self.seen: dict[Place, tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], float]] = {}

    def __call__(self, request: Request) -> None:
        """Look at one request of one layer."""
        first = not any(layer == request.layer for layer, _, _ in self.seen)
        self.steps += request.layer == 0
        for place, keys, live in page_keys(request) if first else ():
            self.seen[place] = keys, live, [], request.scaling
        if self.steps % self.every == 0:
            for (layer, row, head), kept in self.seen.items():
                if layer == request.layer:
                    kept[2].append(torch.from_numpy(np.array(request.queries[row, head])))


class Head:
    """One KV head: its pages (N, 16, D), their summaries, and what the host ranks by."""

    def __init__(self, keys: torch.Tensor, live: torch.Tensor, scaling: float) -> None:
        self.live, self.scaling = live[None], scaling
        self.keys = torch.where(live[..., None], keys, 0.0)[None]
        n, dim = live.sum(1), keys.shape[2]
        self.mean, self.ln_n = self.keys[0].sum(1) / n[:, None], n.log()
        self.radius = torch.where(live, (self.keys[0] - self.mean[:, None]).norm(dim=-1), 0.0).amax(1)
        self.words = ((live.long() << torch.arange(48, 64)).sum(1) | 1)[None]
        slots, self.rotation = torch.arange(len(keys)), rotation_matrix(dim, torch.device("cpu"))
        codes = empty_codes(len(keys), dim, torch.device("cpu"))
        page_codes_ref(codes, slots, self.words[0], self.rotation, self.keys[0])
        self.decoded = {fine: decoded(codes, slots, fine=fine)[None] for fine in (False, True)}
        self.distance = codes.numbers[2][None]

    def by_means(self, q: torch.Tensor) -> torch.Tensor:
        """Estimates (1, G, N) for queries (G, D)."""
        room = MEAN_REACH * q.norm(dim=-1, keepdim=True) * self.radius
        return ((q @ self.mean.T + room) * self.scaling + self.ln_n)[None]

    def by_codes(self, q: torch.Tensor, *, fine: bool) -> torch.Tensor:
        """Estimates (1, G, N) for queries (G, D)."""
        stored = self.decoded[fine], self.distance, self.words
        return page_scan_ref(q[None], self.rotation, *stored, self.scaling, reach=REACH[fine])

    def exact(self, q: torch.Tensor, lse: torch.Tensor, best: int) -> torch.Tensor:
        """Scores (1, N, G) from the keys of the best tokens."""
        guessed = self.decoded[True] @ self.rotation.T
        return page_best_ref(q[None], self.keys, guessed, self.live, lse, self.scaling, best=best)


def choices(head: Head, q: torch.Tensor, n_pages: int, candidates: list[int]) -> Iterator[tuple[str, int, list[int]]]:
    """Way, candidates, and the pages chosen for queries (G, D)."""
    means, signs, both = head.by_means(q), head.by_codes(q, fine=False), head.by_codes(q, fine=True)
    lse = torch.logsumexp(both, -1)
    scores = {best: head.exact(q, lse, best) for best in (BEST_TOKENS, 16)}
    for c in candidates:
        top = {way: _best(x, c) for way, x in (("means", means), ("2 bits", both), ("1 bit", signs))}
        yield "means", c, page_pick_ref(scores[16], means, top["means"], n_pages)[0][0]
        yield "2 bits, all keys", c, page_pick_ref(scores[16], both, top["2 bits"], n_pages)[0][0]
        yield f"2 bits, {BEST_TOKENS} keys", c, page_pick_ref(scores[BEST_TOKENS], both, top["2 bits"], n_pages)[0][0]
        kept = page_refine_ref(both, signs, _best(signs, COARSE * c), c)
        yield f"1 bit, {BEST_TOKENS} keys", c, page_pick_ref(scores[BEST_TOKENS], signs, kept, n_pages)[0][0]


def _best(estimate: torch.Tensor, n: int) -> list[list[int]]:
    weight = torch.softmax(estimate[0], -1).sum(0)
    return [weight.topk(min(n, len(weight))).indices.tolist()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--tasks", nargs="+", default=["chase8", "gsm", "kv_dense", "kv_rand"])
    parser.add_argument("--pages", type=int, default=13)
    parser.add_argument("--candidates", type=int, nargs="+", default=[32, 48, 64, 96, 312])
    parser.add_argument("--every", type=int, default=12, help="steps from one that is looked at to the next")
    parser.add_argument("--seed", type=int, default=5)
    parser.add_argument("--model", help="folder of another model with the same tokenizer, default needle-3m")
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_needle("cpu", torch.float32)
    if args.model is not None:
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    for task in args.tasks:
        recorder = Recorder(args.every)
        batch = make_samples(task, args.length, args.samples, seed=args.seed, rows_per_seed=args.samples)
        answer(model, tokenizer, batch, prefill(model, batch), recorder)
        losses: dict[tuple[str, int], list[tuple[float, int]]] = {}
        for keys, live, kept, scaling in recorder.seen.values():
            head = Head(keys, live, scaling)
            for q in kept:
                share = torch.softmax(page_exact_ref(q[None], head.keys, head.live, scaling)[0].T, -1).sum(0)
                best = share.topk(min(args.pages, len(share))).values.sum()
                for way, c, picked in choices(head, q, args.pages, args.candidates):
                    losses.setdefault((way, c), []).append((float(best - share[picked].sum()), len(q)))
        for (way, c), values in sorted(losses.items()):
            lost, heads = np.array(values).T
            many = 1000 * (lost > 0.05).mean()
            print(
                f"{task:10} {way:>16} {c:4} candidates: {(lost / heads).mean():.4f} {many:6.1f} ({len(lost)} queries)",
                flush=True,
            )


if __name__ == "__main__":
    main()
