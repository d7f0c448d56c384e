"""Each policy once more, one row at a time and in plain loops over float64: nothing is shared with the package."""

from __future__ import annotations

import numpy as np
import torch
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


class H2O:
    def __init__(self, prompt: PromptRow, *, budget: int) -> None:
        (n_heads, group), n = prompt.queries.shape[:2], prompt.keys.shape[1]
        self.heavy, self.recent = budget // 2, budget - budget // 2
        self.scores = [dict.fromkeys(range(n), 0.0) for _ in range(n_heads)]
        for h in range(n_heads):
            for g in range(group):
                for i in range(n):
                    for j, w in enumerate(softmax(prompt.keys[h, : i + 1] @ prompt.queries[h, g, i] * SCALING)):
                        self.scores[h][j] += w
        self._drop(n)

    def _drop(self, n):
        for h, scores in enumerate(self.scores):
            old = [i for i in scores if i < n - self.recent]
            kept = set(top(scores, old, self.heavy)) | {i for i in scores if i >= n - self.recent}
            self.scores[h] = {i: s for i, s in scores.items() if i in kept}

    def step(self, keys, query):
        n, mask = keys.shape[1], np.zeros((*query.shape[:2], keys.shape[1]), bool)
        for h, scores in enumerate(self.scores):
            scores[n - 1] = 0.0
            held = sorted(scores)
            mask[h, :, held] = True
            for q in query[h]:
                for i, w in zip(held, softmax(keys[h, held] @ q * SCALING), strict=True):
                    scores[i] += w
        self._drop(n)
        return mask


class ArkVale:
    def __init__(self, _: PromptRow, *, budget: int, page: int, sink: int, window: int) -> None:
        self.budget, self.page, self.sink, self.window = budget // page, page, sink, window

    def step(self, keys, query):
        n, mask = keys.shape[1], np.zeros((*query.shape[:2], keys.shape[1]), bool)
        last = (n - 1) // self.page
        near = {*range(self.sink), *range(max(last - self.window + 1, 0), last + 1)}
        scores = {}
        for p in range(self.sink, last - self.window + 1):
            bounds = []
            for h, heads in enumerate(query):
                block = keys[h, p * self.page : (p + 1) * self.page]
                centre = (block.max(0) + block.min(0)) / 2
                half = np.abs(block - centre).mean(0)
                bounds += [np.maximum(q * (centre + half), q * (centre - half)).sum() for q in heads]
            scores[p] = np.mean(bounds)
        for p in near | set(top(scores, list(scores), self.budget - self.sink - self.window)):
            mask[:, :, p * self.page : (p + 1) * self.page] = True
        return mask


class PQCache:
    def __init__(self, prompt: PromptRow, *, budget: int, sink: int, parts: int, bits: int, iterations: int) -> None:
        self.sink, self.window = sink, (budget - sink) // 2
        self.k, self.parts = budget - sink - self.window, parts
        n = prompt.keys.shape[1]
        longest = 150  # one draw for the batch: of the columns that a row has, the largest numbers
        draw = torch.rand(longest, generator=torch.Generator().manual_seed(0)).numpy()[:n]
        first = [int(i) for i in np.argsort(-draw) if i >= sink][: 2**bits]
        self.centroids = []
        for head in prompt.keys:
            for part in np.split(head, parts, axis=1):
                centroids = part[first].copy()
                for _ in range(iterations):
                    codes = [self._nearest(x, centroids) for x in part]
                    for c in range(len(centroids)):
                        members = [part[i] for i in range(sink, n) if codes[i] == c]
                        centroids[c] = np.mean(members, 0) if members else centroids[c]
                self.centroids.append(centroids)

    @staticmethod
    def _nearest(x, centroids):
        return int(((centroids - x) ** 2).sum(1).argmin())

    def step(self, keys, query):
        n, mask = keys.shape[1], np.zeros((*query.shape[:2], keys.shape[1]), bool)
        near = [i for i in range(n) if i < self.sink or i >= n - 1 - self.window]
        others = [i for i in range(n) if i not in set(near)]
        for h, heads in enumerate(query):
            coded = np.zeros((n, 0))
            for m, part in enumerate(np.split(keys[h], self.parts, axis=1)):
                centroids = self.centroids[h * self.parts + m]
                coded = np.hstack([coded, [centroids[self._nearest(x, centroids)] for x in part]])
            scores = np.zeros(n)
            if others:
                weights = softmax(heads @ coded[others].T * SCALING).sum(0)
                scores[others] = np.round(np.log(weights), 9)  # equal codes are equal, whatever BLAS does
            mask[h, :, near + top(scores, others, self.k)] = True
        return mask


class PositionalPageOracle:
    def __init__(self, _: PromptRow, *, budget: int, sink: int, window: int, page: int) -> None:
        self.sink, self.window, self.page, self.k = sink, window, page, (budget - sink - window) // page

    def step(self, keys, query):
        n, mask = keys.shape[1], np.zeros((*query.shape[:2], keys.shape[1]), bool)
        stop = n - 1 - self.window
        pages = [list(range(i, min(i + self.page, stop))) for i in range(self.sink, stop, self.page)]
        near = [i for i in range(n) if i < self.sink or i >= stop]
        for h, heads in enumerate(query):
            mask[h, :, near] = True
            middle = heads @ keys[h, self.sink : max(stop, self.sink)].T * SCALING
            weights = softmax(middle).sum(0) if middle.shape[1] else np.zeros(0)
            mass = [weights[[i - self.sink for i in p]].sum() for p in pages]
            for p in top(mass, list(range(len(pages))), self.k):
                mask[h, :, pages[p]] = True
        return mask


class MagicPIG:
    def __init__(self, prompt: PromptRow, *, sink: int, local: int, bits: int, tables: int) -> None:
        self.sink, self.local, self.bits, self.tables = sink, local, bits, tables
        self.n_prompt, self.mean = prompt.keys.shape[1], prompt.keys.mean(1, keepdims=True)
        dim = prompt.keys.shape[2]
        self.planes = torch.randn(tables, bits, dim, generator=torch.Generator().manual_seed(0)).double().numpy()

    def step(self, keys, query):
        n, mask = keys.shape[1], np.zeros((*query.shape[:2], keys.shape[1]), bool)
        self.bias = np.zeros(mask.shape)
        for h, heads in enumerate(query):
            centred = keys[h] - self.mean[h]
            for g, q in enumerate(heads):
                for i in range(n):
                    if i < self.sink or i >= self.n_prompt - self.local:
                        mask[h, g, i] = True
                        continue
                    same = (self.planes @ q > 0) == (self.planes @ centred[i] > 0)
                    if same.all(1).sum() < 2:
                        continue
                    cosine = q @ centred[i] / np.linalg.norm(q) / np.linalg.norm(centred[i])
                    p = (1 - np.arccos(cosine) / np.pi) ** self.bits
                    once = self.tables * p * (1 - p) ** (self.tables - 1)
                    mask[h, g, i], self.bias[h, g, i] = True, -np.log(1 - (1 - p) ** self.tables - once + 1e-4)
        return mask


class RenumberedStreaming:
    """Keys turned back to position 0 and forth to their place in the cache, as complex numbers."""

    def __init__(self, _: PromptRow, *, budget: int, sink: int, frequencies: list[float]) -> None:
        self.sink, self.window, self.frequencies = sink, budget - sink, np.array(frequencies)

    def _turned(self, keys, positions):
        n, out = len(self.frequencies), keys.copy()
        pairs = (keys[..., :n] + 1j * keys[..., n : 2 * n]) * np.exp(1j * np.outer(positions, self.frequencies))
        out[..., :n], out[..., n : 2 * n] = pairs.real, pairs.imag
        return out

    def step(self, keys, query):
        n, mask = keys.shape[1], np.zeros((*query.shape[:2], keys.shape[1]), bool)
        held = [i for i in range(n) if i < self.sink or i >= n - 1 - self.window]
        mask[:, :, held] = True
        flat = self._turned(keys[:, held], [-i for i in held])
        placed = self._turned(flat, range(len(held)))
        # The query stands behind all of them: at the place of the newest token.
        asked = self._turned(query, np.full(query.shape[1], len(held) - n))
        self.bias = np.zeros(mask.shape)
        for h in range(len(keys)):
            self.bias[h][:, held] = (asked[h] @ placed[h].T - query[h] @ keys[h, held].T) * SCALING
        return mask
