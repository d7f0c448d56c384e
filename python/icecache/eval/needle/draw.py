"""Seeded random draws of the needle tasks, on one device.

Dimension key: B rows of a batch, R records of a row, T tokens of a row.
"""

from __future__ import annotations

import math
import random
from typing import Final

import torch
from torch import Tensor

from icecache.eval.needle import words
from icecache.eval.needle.vocabulary import STOP, VOCABULARY, ZERO, token_ids

# Multipliers of the affine bijections in `Draw.distinct`: large enough to scatter neighbours.
PRIMES: Final = tuple(p for p in range(31, 9000) if all(p % d for d in range(2, int(p**0.5) + 1)))
# Up to here distinct numbers come from a full permutation; above, from an affine bijection.
PERMUTATION_LIMIT: Final = 1024


class WordPools:
    """Token ids of the word lists, each int64 `(n_words,)` on one device.

    Parameters
    ----------
    device : torch.device
        Where the pools live.
    """

    def __init__(self, device: torch.device) -> None:
        def pool(names: tuple[str, ...]) -> Tensor:
            return torch.tensor(token_ids(" ".join(names)), device=device)

        self.adjectives = pool(words.KEY_ADJECTIVES)
        self.nouns = pool(words.KEY_NOUNS)
        self.nodes = torch.cat([self.adjectives, self.nouns])
        self.names = pool(words.NAMES)
        self.items = pool(words.ITEMS)
        self.gains = pool(words.GAIN_VERBS)
        self.losses = pool(words.LOSS_VERBS)
        self.letters = pool(words.LETTERS)
        self.filler_adjectives = pool(words.FILLER_ADJECTIVES)
        self.topic_nouns = torch.stack([pool(tuple(nouns.split())) for nouns, _ in words.TOPICS.values()])
        self.topic_verbs = torch.stack([pool(tuple(verbs.split())) for _, verbs in words.TOPICS.values()])
        glue = pool(words.FILLER_GLUE)
        topics = [self.topic_nouns.flatten(), self.topic_verbs.flatten()]
        self.filler = torch.cat([*topics, self.filler_adjectives, glue])
        first = len(words.SPECIAL) + len(words.DIGITS)
        anything = [t for t in range(first, len(VOCABULARY)) if not VOCABULARY[t].startswith("<") and t != STOP]
        self.anything = torch.tensor(anything, device=device)


class Draw:
    """All randomness of a batch: tensors for what the words are, `shapes` for how many there are.

    Parameters
    ----------
    device : torch.device or str
        Where tensors are drawn. CPU and CUDA give different numbers for one seed.
    seed : int
        The only source of randomness.
    """

    def __init__(self, device: torch.device | str, seed: int) -> None:
        self.device = torch.device(device)
        self.generator = torch.Generator(device=self.device)
        self.generator.manual_seed(seed)
        self.shapes = random.Random(seed)
        self.words = WordPools(self.device)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """Integers in `[low, high)`, int64 of the given shape."""
        return torch.randint(low, high, shape, generator=self.generator, device=self.device)

    def uniform(self, *shape: int) -> Tensor:
        """Numbers in `[0, 1)`, float32 of the given shape."""
        return torch.rand(*shape, generator=self.generator, device=self.device)

    def pick(self, pool: Tensor, *shape: int) -> Tensor:
        """Entries of `pool` `(n,)`, with replacement."""
        return pool[self.integers(0, len(pool), *shape)]

    def digits(self, rows: int, count: int, length: int) -> Tensor:
        """Tokens of random decimal digits, int64 `(rows, count, length)`."""
        return self.integers(0, 10, rows, count, length) + ZERO

    def distinct(self, rows: int, count: int, below: int) -> Tensor:
        """Numbers below `below`, distinct within a row.

        Parameters
        ----------
        rows, count : int
            Shape of the result; `count <= below`.
        below : int
            Exclusive upper bound. Above 1024 the numbers are an affine image of `0 .. count - 1` modulo
            `below`, which is a bijection because the multiplier is a prime that does not divide it.

        Returns
        -------
        Tensor
            int64 `(rows, min(count, below))`.
        """
        if below <= PERMUTATION_LIMIT:
            return self.uniform(rows, below).argsort(1)[:, :count]
        primes = torch.tensor([p for p in PRIMES if below % p], device=self.device)
        steps = torch.arange(count, device=self.device)
        return (self.pick(primes, rows, 1) * steps + self.integers(0, below, rows, 1)) % below

    def log_uniform_count(self, limit: int) -> int:
        """Draw a count in `1 .. limit`, on a logarithmic scale more often large than small."""
        return max(1, round(math.exp(self.shapes.random() ** 0.5 * math.log(limit + 0.5))))
