"""The needle tasks as a suite: texts, that every tokenizer can read, of what the shipped model was trained on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from icecache.eval.needle.samples import Sample as TokenSample
from icecache.eval.needle.samples import make_samples
from icecache.eval.needle.tasks import TASKS
from icecache.eval.needle.vocabulary import BOS, text_of
from icecache.eval.task import DataDir, Sample, Suite, Turn

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Samples drawn from one seed: they share lengths, so they run in one batch. Part of a sample's identity.
ROWS_PER_SEED: Final = 16
SCORED: Final = ("passkey", "kv32", "kv_dense", "kv_rand", "vt3", "gsm", "chase8")


@dataclass(frozen=True, slots=True)
class NeedleTask:
    """A needle task; right only if every token of the answer is."""

    name: str
    suite: str = "needle"
    metric: str = "exact match"

    def samples(
        self,
        tokenizer: PreTrainedTokenizerBase,  # noqa: ARG002 - a token is a word here, whatever the tokenizer makes of it
        *,
        length: int | None,
        n: int,
        seed: int,
        data: DataDir | None,  # noqa: ARG002 - needs no files
    ) -> Iterator[Sample]:
        """Give samples of `length` words (tokens of needle-3m); see :class:`icecache.eval.task.Task`."""
        n_tokens = length or SUITE.lengths[0]
        # Runs with neighbouring seeds must not share batches: a seed is a stretch of the generator's seeds.
        for i, drawn in enumerate(make_samples(self.name, n_tokens, n, seed * 1_000_003, ROWS_PER_SEED)):
            yield as_text(drawn, f"{n_tokens}-{seed}-{i}", n_tokens)

    def score(self, prediction: str, sample: Sample) -> float:
        """1 if the words are those of the reference."""
        return float(words_of(prediction) == words_of(sample.references[0]))

    def grades(self, prediction: str, sample: Sample) -> Mapping[str, float]:
        """Share of the answer's words that stand in their place: tells a near miss from a guess."""
        right = words_of(sample.references[0])
        said = words_of(prediction)
        return {"words in place": sum(a == b for a, b in zip(right, said, strict=False)) / len(right)}


def words_of(text: str) -> list[str]:
    """Words, every digit and mark by itself, as the tasks' tokenizer cuts them."""
    return "".join(c if c.isalpha() or c.isspace() or c in "<>" else f" {c} " for c in text).split()


def as_text(drawn: TokenSample, identity: str, length: int) -> Sample:
    """Write a drawn sample as text, its given stretches as turns.

    Parameters
    ----------
    drawn : TokenSample
        Token ids of needle-3m.
    identity : str
        The sample's id.
    length : int
        Tokens of the whole sample.
    """
    segments = drawn.segments()
    turns = []
    for position in range(1, len(segments), 2):
        _, start, middle = segments[position]
        stop = segments[position + 1][2]
        turns.append(Turn(text_of(drawn.answer[start:middle]), stop - middle))
    context = drawn.context[1:] if drawn.context[0] == BOS else drawn.context
    meta: dict[str, str | int | float] = {"length": length}
    if len(drawn.evidence) == 1:
        meta["depth"] = round(drawn.evidence[0][0] / max(1, len(drawn.context)), 4)
    return Sample(
        task=drawn.task,
        id=identity,
        context=text_of(context),
        question=f" {text_of(drawn.question)}",
        references=(text_of(drawn.answer),),
        max_new_tokens=segments[0][2],
        chat=False,
        meta=meta,
        turns=tuple(turns),
    )


SUITE: Final = Suite(
    name="needle",
    summary="the tasks of the shipped model: retrieval from synthetic text",
    tasks=tuple(NeedleTask(name) for name in TASKS),
    samples=64,
    lengths=(4096,),
    default_tasks=SCORED,
    label="synthetic: retrieval under a budget, not language",
)
