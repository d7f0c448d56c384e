"""Text between needles: RULER's noise line, its essays, or sentences of our own grammar."""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass
from typing import Final

from icecache.errors import DataError
from icecache.eval.needle.words import FILLER_ADJECTIVES, TOPICS
from icecache.eval.task import DataDir

NOISE: Final = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
ESSAY_FILES: Final = ("PaulGrahamEssays.json", "ruler/PaulGrahamEssays.json", "json/PaulGrahamEssays.json")
ESSAY_HUB: Final = "baber/paul_graham_essays"
OWN_TEXT: Final = "haystack.txt"
GRAMMAR_WORDS: Final = 200_000
"""Words of the generated text; longer haystacks repeat it, as they repeat the essays."""
SENTENCE_END: Final = re.compile(r"(?<=[.!?])\s+(?=[\"'(\[]?[A-Z0-9])")


@dataclass(frozen=True, slots=True)
class Prose:
    """Running text that needles are put between the sentences of.

    Parameters
    ----------
    source : str
        Written into every sample.
    words : tuple of str
        The text, split at white space.
    """

    source: str
    words: tuple[str, ...]

    def sentences(self, n_words: int) -> list[str]:
        """First `n_words` words as sentences; the text repeats where it ends.

        RULER cuts sentences with NLTK's trained model; the rule here is: after ".", "!" or "?", before a capital or a
        digit. Needles may therefore stand a sentence off.
        """
        repeats, rest = divmod(n_words, len(self.words))
        text = " ".join(self.words * repeats + self.words[:rest])
        return SENTENCE_END.split(text) if text else []


def essays(data: DataDir | None) -> Prose:
    """Essays of RULER, from the folder or, without one, from the hub.

    Raises
    ------
    DataError
        If they are not there; the message names the file and the forms that need none.
    """
    if data is None:
        return _hub_essays()
    try:
        path = data.find(*ESSAY_FILES)
    except DataError as error:
        msg = f"{error}. This form needs RULER's essays; the suite ruler-offline has it with a synthetic haystack"
        raise DataError(msg) from error
    try:
        text = json.loads(path.read_text(encoding="utf-8"))["text"]
        return Prose("essay", tuple(text.split()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        msg = f'{path} must be a JSON object {{"text": "..."}} with the essays: {error!r}'
        raise DataError(msg) from error


def _hub_essays() -> Prose:
    from icecache.eval.data.hub import load_hub

    hint = f"or give --data-dir with {ESSAY_FILES[0]}, or take the suite ruler-offline"
    rows = load_hub(ESSAY_HUB, None, "train", hint=hint)
    return Prose("essay", tuple(" ".join(str(row["text"]) for row in rows).split()))


def synthetic(data: DataDir | None) -> Prose:
    """Text in place of the essays: `haystack.txt` of the folder, else sentences of a small grammar."""
    if data is not None and (data.path / OWN_TEXT).is_file():
        words = data.find(OWN_TEXT).read_text(encoding="utf-8").split()
        if not words:
            msg = f"{data.path / OWN_TEXT} is empty"
            raise DataError(msg)
        return Prose(OWN_TEXT, tuple(words))
    return Prose("synthetic-grammar", _grammar(random.Random(0), GRAMMAR_WORDS))


def _grammar(rng: random.Random, n_words: int) -> tuple[str, ...]:
    """Write sentences such as "The old boat drifts near a quiet reef." in stretches of one topic."""
    words: list[str] = []
    topics = [(nouns.split(), verbs.split()) for nouns, verbs in TOPICS.values()]
    while len(words) < n_words:
        nouns, verbs = rng.choice(topics)
        for _ in range(rng.randint(4, 9)):
            words += f"The {rng.choice(FILLER_ADJECTIVES)} {rng.choice(nouns)} {rng.choice(verbs)}".split()
            words += f"{rng.choice(('near', 'with', 'in', 'on'))} the {rng.choice(nouns)}".split()
            if rng.random() < 0.5:
                words += f"and the {rng.choice(nouns)} is {rng.choice(FILLER_ADJECTIVES)}".split()
            words[-1] += "."
    return tuple(words)
