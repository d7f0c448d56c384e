"""Variable tracking: a chain of assignments among noise; after a worked example all names of a value are asked for."""

from __future__ import annotations

import random
import string
from dataclasses import dataclass
from typing import Final

from icecache.eval.ruler.form import Draft
from icecache.eval.ruler.haystack import NOISE

TASK_LINE: Final = "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
QUESTION: Final = "Question: Find all variables that are assigned the value {value} in the text above."
# "assgined" is RULER's spelling.
PREFIX: Final = (
    " Answer: According to the chain(s) of variable assignment in the text above, {n} variables are assgined the value "
    "{value}, they are: "
)
HOPS: Final = 4
NAME_LETTERS: Final = 5
EXAMPLE_LETTERS: Final = 3
EXAMPLE_LINES: Final = 10
"""Noise lines of the worked example: what RULER's search finds for 500 tokens with common tokenizers."""


@dataclass(frozen=True, slots=True)
class Variables:
    """Form of `vt`: one chain, four hops.

    Parameters
    ----------
    example_lines : int, default=10
        Noise lines of the worked example; 0: no example.
    """

    example_lines: int = EXAMPLE_LINES

    new_tokens = 30
    least = HOPS + 2
    most = None

    def step(self, length: int) -> int:
        """10 lines, 2 below 4096 tokens."""
        return 10 if length >= 4096 else 2

    def draft(self, rng: random.Random, size: int, length: int, index: int) -> Draft:  # noqa: ARG002
        """Write the prompt; see :class:`icecache.eval.ruler.form.Form`."""
        example = ""
        if self.example_lines:
            shown = chain(rng, self.example_lines, EXAMPLE_LETTERS)
            example = shown.text + " " + " ".join(shown.references) + "\n\n\n\n"
        asked = chain(rng, size, NAME_LETTERS)
        return Draft(
            example + asked.context, asked.question, asked.answer_prefix, asked.references, {"haystack": "noise"}
        )


def chain(rng: random.Random, n_lines: int, letters: int) -> Draft:
    """Write one chain among noise lines.

    Parameters
    ----------
    rng : random.Random
        Source of names, value and places.
    n_lines : int
        Noise lines, more than `HOPS + 1`.
    letters : int
        Of each name.
    """
    names: list[str] = []
    while len(names) < HOPS + 1:
        name = "".join(rng.choices(string.ascii_uppercase, k=letters))
        if name not in names:
            names.append(name)
    value = str(rng.randrange(10_000, 99_999))
    assignments = [f"VAR {names[0]} = {value}"]
    assignments += [f"VAR {names[i + 1]} = VAR {names[i]} " for i in range(HOPS)]
    lines = [NOISE + "\n"] * n_lines
    for i, place in enumerate(sorted(rng.sample(range(n_lines), len(assignments)))):
        lines.insert(place + i, assignments[i])
    body = " ".join(lines).replace(". \n", ".\n")
    return Draft(
        f"{TASK_LINE}{body}\n", QUESTION.format(value=value), PREFIX.format(n=len(names), value=value), tuple(names)
    )
