"""RULER's score: which references stand in the answer, compared without case."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

# Control characters become line breaks before the comparison, as the published evaluation does it.
CONTROL: Final = re.compile(r"[\x00-\x1f]")


def clean(prediction: str) -> str:
    """Answer as it is compared: control characters replaced by line breaks, ends stripped, lower case."""
    return CONTROL.sub("\n", prediction.strip()).strip().lower()


def match_all(prediction: str, references: Sequence[str]) -> float:
    """Share of the references that the answer contains ("string_match_all")."""
    answer = clean(prediction)
    return sum(reference.lower() in answer for reference in references) / len(references)


def match_any(prediction: str, references: Sequence[str]) -> float:
    """1 where the answer contains any reference, else 0 ("string_match_part")."""
    answer = clean(prediction)
    return float(any(reference.lower() in answer for reference in references))
