"""Answers read out of the prompts alone, by rules: what a perfect reader would say. References must agree."""

from __future__ import annotations

import re
from collections import Counter

from icecache.eval.task import Sample


def niah(sample: Sample) -> list[str]:
    """Values of the needles whose keys are asked for."""
    keys = re.search(r" for (.+) mentioned", sample.question)[1].replace(", and ", ", ").split(", ")
    return [
        value
        for key in keys
        for value in re.findall(
            rf"One of the special magic \w+ for {re.escape(key)} is: (\S+?)\.(?:\s|$)", sample.context
        )
    ]


def variables(sample: Sample) -> list[str]:
    """Names that hold the value, by following assignments (the worked example has another value)."""
    value = re.search(r"value (\d+)", sample.question)[1]
    held = set()
    body = sample.context
    for _ in range(20):
        held |= {name for name, right in re.findall(r"VAR ([A-Z]+) = (\d+)", body) if right == value}
        held |= {name for name, right in re.findall(r"VAR ([A-Z]+) = VAR ([A-Z]+)", body) if right in held}
    return sorted(held)


def common_words(sample: Sample) -> list[str]:
    """The ten most common words of the last list."""
    body = sample.context.rsplit("Memorize the ones", 1)[1]
    return [word for word, _ in Counter(re.findall(r"\d+\. (\S+)", body)).most_common(10)]


def frequent_words(sample: Sample) -> list[str]:
    """The three most frequent words that are not dots."""
    body = sample.context.split("coded words. ", 1)[1]
    return [word for word, _ in Counter(w for w in body.split() if w != "...").most_common(3)]


def questions(sample: Sample) -> list[str]:
    """Where somebody, or somebody's teacher, lives."""
    homes = dict(re.findall(r"(\w+ \w+) lives in (\w+)\.", sample.context))
    teachers = dict(re.findall(r"The teacher of (\w+ \w+) is (\w+ \w+)\.", sample.context))
    two = re.search(r"the teacher of (\w+ \w+) live", sample.question)
    return [homes[teachers[two[1]] if two else re.search(r"does (\w+ \w+) live", sample.question)[1]]]


def solver(task: str) -> object:
    """The rule for a task."""
    by_name = {"ruler_vt": variables, "ruler_cwe": common_words, "ruler_fwe": frequent_words}
    return niah if task.startswith("niah") else questions if task.startswith("ruler_qa") else by_name[task]
