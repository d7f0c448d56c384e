"""How much of what a decode step reads over the bus was read before, and how well the next layer's query is known.

    python benches/python/bench_page_overlap.py --length 16384 --samples 2 --tasks chase8 gsm kv_dense

On needle-3m, all layers and KV heads, decoded under a budget of 256. Pages are ranked by their exact attention mass
over the query group. Printed per task and number of pages a step: the share that the step before has read too; hit
rates of caches of 2, 4 and 8 times as many pages that forget what was used least recently; and, with the query that the
layer before could estimate (the next layer's own norm, projection and rotation on its own input), the share of these
pages found by it.
"""

from __future__ import annotations

import argparse
from collections import OrderedDict

import numpy as np
import torch
from icecache.eval.needle import load_needle, make_samples
from icecache.kernels.page_exact import page_exact_ref
from icecache.select import Request
from requests_seen import Place, answer, page_keys, prefill
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

PAGES = (13, 48, 61)
"""Read at a budget of 256; scored from their keys there; read at a budget of 1,024."""
CACHES = (2, 4, 8)


class Ranks:
    """Page order of every step, by layer, row and head, for the query asked and for the one estimated before."""

    def __init__(self) -> None:
        self.asked: dict[Place, list[np.ndarray]] = {}
        self.estimated: dict[Place, list[np.ndarray]] = {}
        self.guess: dict[int, torch.Tensor] = {}
        self.cosines: list[float] = []
        self._keys: dict[Place, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, request: Request) -> None:
        """Rank all pages of one layer for one step."""
        if (request.layer, 0, 0) not in self._keys:
            for place, keys, live in page_keys(request):
                self._keys[place] = torch.where(live[..., None], keys, 0.0), live
        guess = self.guess.pop(request.layer, None)
        for row, forest in enumerate(request.forests):
            for head in range(forest.n_kv_heads):
                place = request.layer, row, head
                query = torch.from_numpy(np.array(request.queries[row, head]))
                self.asked.setdefault(place, []).append(self._ranked(place, query, request.scaling))
                if guess is not None:
                    other = guess[row, :, 0].unflatten(0, (forest.n_kv_heads, -1))[head]
                    self.cosines.append(float(torch.cosine_similarity(query, other, dim=-1).mean()))
                    self.estimated.setdefault(place, []).append(self._ranked(place, other, request.scaling))

    def _ranked(self, place: Place, query: torch.Tensor, scaling: float) -> np.ndarray:
        keys, live = self._keys[place]
        share = torch.softmax(page_exact_ref(query[None], keys[None], live[None], scaling)[0].T, -1).sum(0)
        return share.topk(min(max(PAGES), len(share))).indices.numpy()


def estimate_next(model: torch.nn.Module, ranks: Ranks) -> list[torch.utils.hooks.RemovableHandle]:
    """Let every layer estimate the query of the next one from its own input."""
    layers = model.model.layers

    def hook(number: int):  # type: ignore[no-untyped-def]
        def before(_module: torch.nn.Module, args: tuple[torch.Tensor, ...], kwargs: dict[str, object]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            if hidden.shape[1] != 1:
                return
            following = layers[number + 1]
            attention = following.self_attn
            query = attention.q_proj(following.input_layernorm(hidden)).unflatten(-1, (-1, attention.head_dim))
            query = query.transpose(1, 2)
            ranks.guess[number + 1] = apply_rotary_pos_emb(query, query, *kwargs["position_embeddings"])[0]

        return before

    return [layers[i].register_forward_pre_hook(hook(i), with_kwargs=True) for i in range(len(layers) - 1)]


def hit_rate(steps: list[np.ndarray], capacity: int) -> float:
    """Of an LRU cache of `capacity` pages, over all steps but the first."""
    cache: OrderedDict[int, None] = OrderedDict()
    hits = asked = 0
    for number, step in enumerate(steps):
        for page in step.tolist():
            hits += number > 0 and page in cache
            asked += number > 0
            cache[page] = None
            cache.move_to_end(page)
        while len(cache) > capacity:
            cache.popitem(last=False)
    return hits / max(asked, 1)


def overlap(a: list[np.ndarray], b: list[np.ndarray]) -> float:
    """Mean share of the pages of `a` that are in `b`, step by step."""
    return float(np.mean([len(np.intersect1d(x, y)) / len(x) for x, y in zip(a, b, strict=True)]))


def report(task: str, ranks: Ranks) -> None:
    for n in PAGES:
        asked = {place: [x[:n] for x in steps] for place, steps in ranks.asked.items() if len(steps) > 1}
        again = np.mean([overlap(steps[1:], steps[:-1]) for steps in asked.values()])
        hits = [np.mean([hit_rate(steps, times * n) for steps in asked.values()]) for times in CACHES]
        known = np.mean([overlap(asked[p], [x[:n] for x in e]) for p, e in ranks.estimated.items() if p in asked])
        rates = " ".join(f"{times}x {rate:.2f}" for times, rate in zip(CACHES, hits, strict=True))
        print(f"{task:9} {n:3} pages: step before {again:.2f}; caches {rates}; estimated query {known:.2f}", flush=True)
    lengths = [len(x) for x in ranks.asked.values()]
    print(f"{task:9} {max(lengths)} steps; estimated query: mean cosine {np.mean(ranks.cosines):.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=16384)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--tasks", nargs="+", default=["chase8", "gsm", "kv_dense"])
    parser.add_argument("--seed", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_needle("cpu", torch.float32)
    for task in args.tasks:
        ranks = Ranks()
        batch = make_samples(task, args.length, args.samples, seed=args.seed, rows_per_seed=args.samples)
        cache = prefill(model, batch)
        handles = estimate_next(model, ranks)
        try:
            answer(model, tokenizer, batch, cache, ranks)
        finally:
            for handle in handles:
                handle.remove()
        report(task, ranks)


if __name__ == "__main__":
    main()
