"""What every task form has in common: a prompt whose haystack can be made larger or smaller."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Draft:
    """A prompt of some size, before it is known whether it fits.

    Parameters
    ----------
    context : str
        Task line and haystack (and the worked example, where the form has one), up to the question.
    question : str
        What is asked.
    answer_prefix : str
        Beginning of the answer; given to the model.
    references : tuple of str
        What the answer should contain.
    meta : mapping
        What tables may group by.
    """

    context: str
    question: str
    answer_prefix: str
    references: tuple[str, ...]
    meta: Mapping[str, str | int | float] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The whole prompt."""
        return self.context + self.question + self.answer_prefix


class Form(Protocol):
    """A task form.

    Attributes
    ----------
    new_tokens : int
        Tokens the answer may take; they count towards the length.
    least : int
        Smallest haystack.
    most : int or None
        Largest haystack; None: it repeats or is generated without end.
    """

    @property
    def new_tokens(self) -> int: ...  # noqa: D102 - see the class

    @property
    def least(self) -> int: ...  # noqa: D102

    @property
    def most(self) -> int | None: ...  # noqa: D102

    def step(self, length: int) -> int:
        """By how much the haystack grows between two sizes that are tried, at this length in tokens."""
        ...

    def draft(self, rng: random.Random, size: int, length: int, index: int) -> Draft:
        """Write a prompt with a haystack of `size` units; the rng and the index decide everything else."""
        ...
