"""Each policy once more, one row at a time and in plain loops over float64: nothing is shared with the package."""

from __future__ import annotations

import numpy as np
from policy_driver import SCALING, PromptRow, softmax


def top(scores: np.ndarray, candidates: list[int], k: int) -> list[int]:
    """The `k` candidates of the largest score."""
    return sorted(candidates, key=lambda i: -scores[i])[: max(k, 0)]


class TokenOracle:
    def __init__(self, _: PromptRow, *, budget: int, sink: int, window: int, per_query: bool) -> None:
        self.budget, self.sink, self.window, self.per_query = budget, sink, window, per_query

    def step(self, keys, query):
        n, mask = keys.shape[1], np.zeros((*query.shape[:2], keys.shape[1]), bool)
        near = [i for i in range(n) if i < self.sink or i >= n - 1 - self.window]
        others = [i for i in range(n) if i not in set(near)]
        for h, heads in enumerate(query):
            logits = heads @ keys[h].T * SCALING
            weights = np.zeros_like(logits)
            if others:
                weights[:, others] = softmax(logits[:, others])
            for g in range(len(heads)):
                scores = logits[g] if self.per_query else weights.sum(0)
                mask[h, g, near + top(scores, others, self.budget - self.sink - self.window)] = True
        return mask


class Quest:
    def __init__(self, _: PromptRow, *, budget: int, page: int = 16) -> None:
        self.k, self.page = max(3, budget // page), page

    def step(self, keys, query):
        n, mask = keys.shape[1], np.zeros((*query.shape[:2], keys.shape[1]), bool)
        pages = [range(i, min(i + self.page, n)) for i in range(0, n, self.page)]
        for h, heads in enumerate(query):
            for g, q in enumerate(heads):
                bounds = np.array(
                    [np.maximum(q * keys[h, p].min(0), q * keys[h, p].max(0)).sum() for p in map(list, pages)]
                )
                for p in top(bounds, list(range(len(pages))), self.k):
                    mask[h, g, list(pages[p])] = True
        return mask


class SnapKV:
    def __init__(self, prompt: PromptRow, *, budget: int, window: int, kernel: int, pool: str, per_query: bool) -> None:
        n, (n_heads, group) = prompt.keys.shape[1], prompt.queries.shape[:2]
        recent, older = list(range(max(n - window, 0), n)), list(range(max(n - window, 0)))
        self.n_prompt, self.kept = n, np.zeros((n_heads, group, n), bool)
        for h in range(n_heads):
            votes = np.zeros((group, n))
            for g in range(group):
                for i in recent:
                    seen = prompt.keys[h, : i + 1]
                    votes[g, older] += softmax(seen @ prompt.queries[h, g, i] * SCALING)[older]
            half = kernel // 2
            around = np.pad(votes, ((0, 0), (half, half)))
            windows = np.stack([around[:, i : i + n] for i in range(kernel)])
            pooled = windows.max(0) if pool == "max" else windows.mean(0)
            for g in range(group):
                scores = pooled[g] if per_query else pooled.mean(0)
                self.kept[h, g, recent + top(scores, older, budget - window)] = True

    def step(self, keys, query):
        return np.concatenate([self.kept, np.ones((*query.shape[:2], keys.shape[1] - self.n_prompt), bool)], -1)
