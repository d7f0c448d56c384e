"""Common words: ten words stand in a numbered list ten times as often as all others."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from icecache.eval.ruler.form import Draft
from icecache.eval.ruler.words import Words

TASK_LINE: Final = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n"
)
QUESTION: Final = "Question: What are the 10 most common words in the above list?"
PREFIX: Final = " Answer: The top 10 words that appear most often in the list are:"
COMMON: Final = 10
SHORT_TOKENS: Final = 4096


@dataclass(frozen=True, slots=True)
class CommonWords:
    """Form of `cwe`; its haystack size is the number of different words."""

    words: Words

    new_tokens = 120
    least = COMMON + 1

    @property
    def most(self) -> int:
        """As many as there are different words."""
        return len(self.words.singles)

    def step(self, length: int) -> int:
        """Ten words, one below 4096 tokens."""
        return 10 if length >= SHORT_TOKENS else 1

    def draft(self, rng: random.Random, size: int, length: int, index: int) -> Draft:  # noqa: ARG002 - form's protocol
        """Write the prompt: 10 words 30 times and the rest 3 times (6 and 1 below 4096 tokens), after an example."""
        is_short = length < SHORT_TOKENS
        shown, shown_answer = self._list(rng, 20 if is_short else 40, *((3, 1) if is_short else (10, 3)))
        body, answer = self._list(rng, size, *((6, 1) if is_short else (30, 3)))
        example = f"{TASK_LINE}{shown}\n{QUESTION}{PREFIX}{_numbered(shown_answer)}\n"
        meta = {"words": self.words.source}
        return Draft(f"{example}{TASK_LINE}{body}\n", QUESTION, PREFIX, tuple(answer), meta)

    def _list(self, rng: random.Random, n_words: int, often: int, seldom: int) -> tuple[str, list[str]]:
        drawn = rng.sample(self.words.singles, n_words)
        entries = drawn[:COMMON] * often + drawn[COMMON:] * seldom
        rng.shuffle(entries)
        return _numbered(entries), drawn[:COMMON]


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))
