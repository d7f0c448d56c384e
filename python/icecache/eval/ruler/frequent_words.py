"""Frequent words: coded words whose counts fall off like a zeta distribution; the three most frequent are asked for."""

from __future__ import annotations

import math
import random
import string
from dataclasses import dataclass
from typing import Final

from icecache.eval.ruler.form import Draft

TASK_LINE: Final = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. "
)
QUESTION: Final = (
    "Question: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?"
)
PREFIX: Final = " Answer: According to the coded text above, the three most frequently appeared words are:"
ZETA_2: Final = math.pi**2 / 6
LETTERS: Final = 6
NOISE: Final = "..."
ASKED: Final = 3


@dataclass(frozen=True, slots=True)
class FrequentWords:
    """Form of `fwe`: exponent 2, words of 6 letters, one word of vocabulary per 50 tokens of length."""

    new_tokens = 50
    # Ranks 2 to 5 have different counts from here on: the three asked for are not a matter of taste.
    least = 60
    most = None

    def step(self, length: int) -> int:
        """Give a 32nd of the length."""
        return max(1, length // 32)

    def draft(self, rng: random.Random, size: int, length: int, index: int) -> Draft:  # noqa: ARG002 - form's protocol
        """Write the prompt: word of rank k stands int(size / (zeta(2) k^2)) times; rank 1 is replaced by dots."""
        n_words = max(ASKED + 2, length // 50)
        vocabulary: list[str] = []
        seen: set[str] = set()
        while len(vocabulary) < n_words:
            word = "".join(rng.choices(string.ascii_lowercase, k=LETTERS))
            if word not in seen:
                seen.add(word)
                vocabulary.append(word)
        vocabulary[0] = NOISE
        entries = [word for k, word in enumerate(vocabulary, 1) for _ in range(int(size / (ZETA_2 * k * k)))]
        rng.shuffle(entries)
        body = " ".join(entries)
        return Draft(f"{TASK_LINE}{body}\n", QUESTION, PREFIX, tuple(vocabulary[1 : ASKED + 1]))
