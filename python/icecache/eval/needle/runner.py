"""Ask the shipped model drawn samples, token ids and all: what the demo and the doctor need beside `icecache eval`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from icecache.eval.greedy import answer_greedily
from icecache.eval.needle.samples import Sample
from icecache.eval.needle.suite import as_text
from icecache.eval.needle.vocabulary import text_of, token_ids
from icecache.eval.render import Prompt, Rendered

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one arm made of one sample.

    Parameters
    ----------
    sample : Sample
        The question.
    produced : tuple of int
        Token ids in the place of `sample.answer`; given tokens included.
    seconds : float
        Time of all steps (question and answer) of the batch this sample ran in.
    n_steps : int
        Steps of the batch; each advanced every row by one token.
    """

    sample: Sample
    produced: tuple[int, ...]
    seconds: float
    n_steps: int

    @property
    def exact_match(self) -> bool:
        """Every token of the answer is right."""
        return self.produced == self.sample.answer

    @property
    def seconds_per_token(self) -> float:
        """Mean time of a step (of the whole batch)."""
        return self.seconds / self.n_steps


def as_prompt(sample: Sample) -> Prompt:
    """Make a drawn sample ready to run; its token ids are the prompt's, no tokenizer comes between."""
    text = as_text(sample, f"{sample.seed}-{sample.row}", len(sample.prompt) + len(sample.answer))
    return Prompt(
        sample=text,
        context=sample.context,
        question=sample.question,
        turns=tuple(tuple(token_ids(turn.given)) for turn in text.turns),
        bare=sample.context[:1],
        sha256=Rendered(text_of(sample.context), text_of(sample.question)).sha256,
    )


def ask(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, samples: Sequence[Sample], cache: Cache
) -> list[Outcome]:
    """Ask and answer in one-token steps, question included.

    Parameters
    ----------
    model : PreTrainedModel
        Attending as the arm wants it.
    tokenizer : PreTrainedTokenizerBase
        Of needle-3m.
    samples : sequence of Sample
        One batch: contexts of one length, questions of one length.
    cache : Cache
        Holds the contexts of these samples; grows.

    Returns
    -------
    list of Outcome
        One a sample.
    """
    n_first = cache.get_seq_length()
    answers, timing = answer_greedily(model, tokenizer, [as_prompt(sample) for sample in samples], cache, "B")
    n_steps, seconds = cache.get_seq_length() - n_first, timing.first_s + timing.rest_s
    return [Outcome(s, a.tokens, seconds, n_steps) for s, a in zip(samples, answers, strict=True)]
