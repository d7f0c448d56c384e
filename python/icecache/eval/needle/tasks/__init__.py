"""The tasks, one a file: each builds the records and questions that a haystack takes up."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Final, Protocol

from icecache.eval.needle.draw import Draw
from icecache.eval.needle.haystack import FillerKind
from icecache.eval.needle.records import Records, Request
from icecache.eval.needle.tasks import (
    chase,
    frequent_words,
    induction,
    key_value,
    passkey,
    recall,
    sums,
    variables,
)


class Builder(Protocol):
    """Builds the records of a batch."""

    def __call__(self, draw: Draw, request: Request) -> Records:
        """Draw the records of `request` from `draw`."""


@dataclass(frozen=True, slots=True)
class Task:
    """A named task of the evaluation.

    Parameters
    ----------
    build : Builder
        Makes its records.
    summary : str
        What it measures, for tables and help texts.
    filler : {"topic", "noise", "random"}, optional
        Its filler; default: drawn row by row.
    """

    build: Builder
    summary: str
    filler: FillerKind | None = None


TASKS: Final[dict[str, Task]] = {
    "passkey": Task(passkey.build, "one number in a repeating text", "noise"),
    "kv32": Task(partial(key_value.build, style="ruler"), "one of 32 key-value needles, RULER's wording"),
    "kv_dense": Task(partial(key_value.build, style="ruler", density=0.8), "one needle of a haystack of needles"),
    "kv_rand": Task(partial(key_value.build, style="random"), "one of 32 needles in random wording"),
    "vt3": Task(variables.build, "variable tracking over three hops"),
    "gsm": Task(sums.build, "sums over four days, worked out step by step"),
    "chase8": Task(chase.build, "pointer chase of eight hops, then recall of a generated one"),
    "fwe": Task(frequent_words.build, "most frequent words: dense aggregation, sparse attention loses here"),
    "mqar": Task(recall.build, "multi-query associative recall (a training task)"),
    "induct": Task(induction.build, "repetition of a random span (a training task)"),
}
# Shares of the training mixture; "kv" draws all wordings.
TRAINING_BUILDERS: Final[dict[str, Builder]] = {
    "mqar": recall.build,
    "induct": induction.build,
    "kv": key_value.build,
    "passkey": passkey.build,
    "vt": variables.build,
    "fwe": frequent_words.build,
    "gsm": sums.build,
    "chase": chase.build,
}
