"""Words for needles and word lists: those of `wonderwords`, as RULER has them, where it is installed, else our own."""

from __future__ import annotations

import functools
import importlib.util
import random
from dataclasses import dataclass

from icecache.eval.needle.words import KEY_ADJECTIVES, KEY_NOUNS


@dataclass(frozen=True, slots=True)
class Words:
    """Word lists.

    Parameters
    ----------
    source : str
        "wonderwords" or "own"; samples carry it, since other words are other prompts.
    adjectives, nouns : tuple of str
        A key is an adjective and a noun with a hyphen between.
    singles : tuple of str
        What word lists are drawn from: sorted, all different.
    """

    source: str
    adjectives: tuple[str, ...]
    nouns: tuple[str, ...]
    singles: tuple[str, ...]

    def key(self, rng: random.Random) -> str:
        """Draw a key such as "quiet-lantern"."""
        return f"{rng.choice(self.adjectives)}-{rng.choice(self.nouns)}"


@functools.cache
def own_words() -> Words:
    """Words of the needle suite. Single words are pairs: so many that 128k tokens of them do not repeat."""
    pairs = sorted(f"{adjective}-{noun}" for adjective in KEY_ADJECTIVES for noun in KEY_NOUNS)
    return Words("own", KEY_ADJECTIVES, KEY_NOUNS, tuple(pairs))


@functools.cache
def wonder_words() -> Words:
    """Words of `wonderwords`, which RULER uses."""
    from wonderwords import RandomWord

    source = RandomWord()
    nouns, adjectives, verbs = (
        tuple(source.filter(include_categories=[kind])) for kind in ("nouns", "adjectives", "verbs")
    )
    return Words("wonderwords", adjectives, nouns, tuple(sorted({*nouns, *adjectives, *verbs})))


def installed_words() -> Words:
    """`wonderwords` where it is installed, else our own."""
    return wonder_words() if importlib.util.find_spec("wonderwords") else own_words()
