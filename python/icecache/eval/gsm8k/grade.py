"""Reading a number out of an answer: strictly, flexibly, and as the paper's authors do it."""

from __future__ import annotations

import re
from typing import Final

# As in lm-evaluation-harness, one more character of any kind belongs to the pattern: a result cannot end the text.
STRICT: Final = re.compile(r"The answer is (\-?[0-9\.\,]+).")
STRICT_FINAL: Final = re.compile(r"The final answer is ((-?[$0-9.,]{2,})|(-?[0-9]+))")
ANY_NUMBER: Final = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
AUTHORS_NUMBER: Final = re.compile(r"\d*\.?\d+")
IGNORED: Final = tuple(re.compile(p) for p in (r",", r"\$", r"(?s).*#### ", r"\.$"))


def plain(text: str) -> str:
    """Text as it is compared: without commas, dollar signs and a final point, in lower case."""
    for pattern in IGNORED:
        text = pattern.sub("", text)
    return text.lower()


def strict(answer: str) -> str | None:
    """Find the number behind the first "The answer is"."""
    found = STRICT.findall(answer)
    return str(found[0]).strip() if found else None


def strict_final(answer: str) -> str | None:
    """Find the number behind the last "The final answer is"."""
    found = STRICT_FINAL.findall(answer)
    return str(found[-1][0]).strip() if found else None


def flexible(answer: str) -> str | None:
    """Last number."""
    found = ANY_NUMBER.findall(answer)
    return next(group for group in found[-1] if group).strip() if found else None


def equal(number: str | None, result: str) -> float:
    """1 if both are the same text after `plain`."""
    return float(number is not None and plain(number) == plain(result))


def authors_equal(answer: str, result: str) -> float:
    """1 if the last number before a further "Question: " has the value of the result; signs are not read."""
    numbers = AUTHORS_NUMBER.findall(answer.split("\nQuestion: ")[0].replace(",", ""))
    right = AUTHORS_NUMBER.findall(result.replace(",", ""))
    return float(bool(numbers) and float(numbers[-1]) == float(right[-1]))
