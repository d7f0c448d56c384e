"""Needles in a haystack: single, several keys, several values, several queries."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

from icecache.eval.ruler.form import Draft
from icecache.eval.ruler.haystack import NOISE, Prose
from icecache.eval.ruler.words import Words

Kind = Literal["words", "numbers", "uuids"]

NEEDLE: Final = "One of the special magic {kind} for {key} is: {value}."
# 40 equal steps from the beginning to the end, in per cent, rounded.
DEPTHS: Final = tuple(round(100 * i / 39) for i in range(40))
SHORT_TOKENS: Final = 4096
"""Below this length the haystack grows in finer steps."""


@dataclass(frozen=True, slots=True)
class Niah:
    """Form of the eight `niah_*` tasks.

    Parameters
    ----------
    words : Words
        Source of keys.
    prose : Prose or None
        Running text; None: lines, of noise or of further needles.
    needle_lines : bool
        Without prose: the lines are needles with other keys.
    key, value : {"words", "numbers", "uuids"}
        Kinds.
    n_keys, n_values, n_queries : int
        Needles: keys times values a key; how many keys are asked for.
    """

    words: Words
    prose: Prose | None = None
    needle_lines: bool = False
    key: Kind = "words"
    value: Kind = "numbers"
    n_keys: int = 1
    n_values: int = 1
    n_queries: int = 1

    new_tokens = 128
    most = None

    @property
    def least(self) -> int:
        """Every needle needs its own place."""
        return 20 if self.prose else max(5, self.n_keys * self.n_values)

    def step(self, length: int) -> int:
        """500 words of prose; 25 lines, 5 below 4096 tokens. Prose below that: 20 words."""
        if self.prose:
            return 500 if length >= SHORT_TOKENS else 20
        return 25 if length >= SHORT_TOKENS else 5

    def draft(self, rng: random.Random, size: int, length: int, index: int) -> Draft:  # noqa: ARG002 - form's protocol
        """Write the prompt; see :class:`icecache.eval.ruler.form.Form`."""
        values: dict[str, list[str]] = {}
        while len(values) < self.n_keys:
            values.setdefault(self._drawn(rng, self.key), self._values(rng))
        needles = [NEEDLE.format(kind=self.value, key=k, value=v) for k, group in values.items() for v in group]
        rng.shuffle(needles)
        body, depth = self._prose(rng, needles, size) if self.prose else self._lines(rng, needles, size, set(values))
        asked = rng.sample(list(values), self.n_queries)
        query = ", ".join(asked[:-1]) + ", and " + asked[-1] if len(asked) > 1 else asked[0]
        source = self.prose.source if self.prose else "needles" if self.needle_lines else "noise"
        meta: dict[str, str | int | float] = {"haystack": source, "words": self.words.source}
        if len(needles) == 1:
            meta["depth"] = depth
        answers = tuple(value for key in asked for value in values[key])
        return self._worded(body, query, answers, meta)

    def _worded(self, body: str, query: str, answers: tuple[str, ...], meta: dict[str, str | int | float]) -> Draft:
        if self.n_values * self.n_queries == 1:
            kind, some, be, what = self.value[:-1], "A special magic", "is", "What is the special magic"
        else:
            kind, some, be, what = self.value, "Some special magic", "are", "What are all the special magic"
        context = (
            f"{some} {kind} {be} hidden within the following text. Make sure to memorize it. "
            f"I will quiz you about the {kind} afterwards.\n{body}\n"
        )
        question = f"{what} {kind} for {query} mentioned in the provided text?"
        prefix = f" The special magic {kind} for {query} mentioned in the provided text {be}"
        return Draft(context, question, prefix, answers, meta)

    def _values(self, rng: random.Random) -> list[str]:
        return [self._drawn(rng, self.value) for _ in range(self.n_values)]

    def _drawn(self, rng: random.Random, kind: Kind) -> str:
        draw: dict[Kind, Callable[[], str]] = {
            "words": lambda: self.words.key(rng),
            "numbers": lambda: str(rng.randint(10**6, 10**7 - 1)),
            "uuids": lambda: str(uuid.UUID(int=rng.getrandbits(128), version=4)),
        }
        return draw[kind]()

    def _prose(self, rng: random.Random, needles: list[str], size: int) -> tuple[str, float]:
        """Needles between sentences, at depths drawn without repetition; the depth of the first is returned."""
        assert self.prose is not None
        sentences = self.prose.sentences(size)
        depths = sorted(rng.sample(DEPTHS, len(needles)))
        places = [int(len(sentences) * depth / 100) for depth in depths]
        parts: list[str] = []
        for start, stop, needle in zip([0, *places], places, needles, strict=False):
            parts += [" ".join(sentences[start:stop]), needle]
        parts.append(" ".join(sentences[places[-1] :]))
        return " ".join(parts), depths[0] / 100

    def _lines(self, rng: random.Random, needles: list[str], size: int, taken: set[str]) -> tuple[str, float]:
        """Needles before lines drawn without repetition; no other line has one of the needles' keys."""
        places = sorted(rng.sample(range(size), len(needles)), reverse=True)
        lines = [NOISE] * size
        for i in range(size if self.needle_lines else 0):
            while (key := self._drawn(rng, self.key)) in taken:
                pass
            lines[i] = NEEDLE.format(kind=self.value, key=key, value=self._drawn(rng, self.value))
        for place, needle in zip(places, needles, strict=True):
            lines.insert(place, needle)
        return "\n".join(lines), places[-1] / size
