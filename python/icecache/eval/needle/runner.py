"""Run samples: one dense prefill of the context, shared by every arm; question and answer in one-token steps.

Setup A: the question belongs to the dense prefill, but for its last token, which starts the answer.
Setup B: only the context is prefilled; every token of question and answer attends the arm's way.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from icecache.eval.needle.samples import Sample

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

Setup = Literal["A", "B"]
# Entering an arm makes the model attend that way and gives the arm's own copy of the prefilled cache; leaving undoes
# it. The prefilled cache itself must stay as it was.
Arm = Callable[["Cache"], AbstractContextManager["Cache"]]


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


def exact_match(outcomes: Sequence[Outcome]) -> float:
    """Share of outcomes whose whole answer is right.

    Parameters
    ----------
    outcomes : sequence of Outcome
        At least one.

    Returns
    -------
    float
        Between 0 and 1.
    """
    return sum(outcome.exact_match for outcome in outcomes) / len(outcomes)


@contextmanager
def full_attention(prefilled: Cache) -> Iterator[Cache]:
    """Arm with the model's own attention over everything: the reference."""
    yield copy.deepcopy(prefilled)


def batches(samples: Sequence[Sample], rows: int) -> Iterator[list[Sample]]:
    """Group neighbouring samples of one shape.

    Parameters
    ----------
    samples : sequence of Sample
        In any order; the order is kept.
    rows : int
        Most samples of a batch.

    Yields
    ------
    list of Sample
        Between 1 and `rows` samples of one `shape`.
    """
    batch: list[Sample] = []
    for sample in samples:
        if batch and (len(batch) == rows or sample.shape != batch[0].shape):
            yield batch
            batch = []
        batch.append(sample)
    if batch:
        yield batch


def prefilled_tokens(sample: Sample, setup: Setup) -> int:
    """How many tokens of the prompt the dense prefill covers."""
    return len(sample.prompt) - 1 if setup == "A" else len(sample.context)


@torch.inference_mode()
def prefill(model: PreTrainedModel, samples: Sequence[Sample], setup: Setup = "B") -> Cache:
    """Process the contexts of a batch with the model's own dense attention.

    Parameters
    ----------
    model : PreTrainedModel
        Not wrapped.
    samples : sequence of Sample
        One batch, of one shape.
    setup : {"A", "B"}, default="B"
        What to prefill, see the module.

    Returns
    -------
    Cache
        A filled `DynamicCache`.
    """
    from transformers import DynamicCache

    stop = prefilled_tokens(samples[0], setup)
    tokens = torch.tensor([sample.prompt[:stop] for sample in samples], device=model.device)
    cache = DynamicCache(config=model.config)
    # The logits of a context are never read; one row of them instead of thousands.
    model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def feed(model: PreTrainedModel, tokens: Tensor, cache: Cache) -> None:
    """Append tokens `(rows, n)` to the cache one at a time, as decode does; logits are dropped."""
    for step in range(tokens.shape[1]):
        model(input_ids=tokens[:, step : step + 1], past_key_values=cache, use_cache=True)


def generate(model: PreTrainedModel, tokens: Tensor, cache: Cache, n_new: int) -> Tensor:
    """Go on greedily with the model's own `generate`.

    Parameters
    ----------
    model : PreTrainedModel
        Wrapped or not.
    tokens : Tensor
        int64 `(rows, n)`; the cache holds all of them but the last.
    cache : Cache
        Grows by `n_new`.
    n_new : int
        Exactly so many tokens are produced; an end-of-sequence token is not allowed to come earlier.

    Returns
    -------
    Tensor
        int64 `(rows, n + n_new)`.
    """
    produced: Tensor = model.generate(
        input_ids=tokens,
        attention_mask=torch.ones_like(tokens),
        past_key_values=cache,
        do_sample=False,
        min_new_tokens=n_new,
        max_new_tokens=n_new,
    )
    return produced


@torch.inference_mode()
def answer(model: PreTrainedModel, samples: Sequence[Sample], cache: Cache, setup: Setup = "B") -> list[Outcome]:
    """Ask and answer on a cache that holds the prefilled context.

    Parameters
    ----------
    model : PreTrainedModel
        Attending as the arm wants it.
    samples : sequence of Sample
        One batch, of one shape.
    cache : Cache
        Holds what `prefill` processed for these samples; grows.
    setup : {"A", "B"}, default="B"
        As in `prefill`.

    Returns
    -------
    list of Outcome
        One a sample.
    """
    first = samples[0]
    tokens = torch.tensor([sample.prompt for sample in samples], device=model.device)
    expected = torch.tensor([sample.answer for sample in samples], device=model.device)
    n_cached, n_prompt = prefilled_tokens(first, setup), tokens.shape[1]
    n_first = n_cached
    began = time.perf_counter()
    for is_given, start, stop in first.segments():
        if is_given:
            tokens = torch.cat([tokens, expected[:, start:stop]], 1)
            continue
        feed(model, tokens[:, n_cached:-1], cache)
        tokens = generate(model, tokens, cache, stop - start)
        n_cached = tokens.shape[1] - 1
    seconds = time.perf_counter() - began
    produced = [tuple(row) for row in tokens[:, n_prompt:].tolist()]
    return [Outcome(sample, row, seconds, n_cached - n_first) for sample, row in zip(samples, produced, strict=True)]


def run_samples(
    model: PreTrainedModel,
    samples: Sequence[Sample],
    arms: Mapping[str, Arm],
    *,
    setup: Setup = "B",
    rows: int = 4,
    report: Callable[[str], None] | None = None,
) -> dict[str, list[Outcome]]:
    """Run every arm on the same samples.

    Parameters
    ----------
    model : PreTrainedModel
        Not wrapped.
    samples : sequence of Sample
        What to ask.
    arms : mapping of str to Arm
        How to attend, by name.
    setup : {"A", "B"}, default="B"
        Whether the question is part of the dense prefill, see the module.
    rows : int, default=4
        Most samples of a batch.
    report : callable, optional
        Called with "prefill" and with each arm's name when a batch is through it.

    Returns
    -------
    dict of str to list of Outcome
        For each arm one outcome a sample, in the samples' order.
    """
    outcomes: dict[str, list[Outcome]] = {name: [] for name in arms}
    for batch in batches(samples, rows):
        prefilled = prefill(model, batch, setup)
        if report:
            report("prefill")
        for name, arm in arms.items():
            with arm(prefilled) as cache:
                outcomes[name] += answer(model, batch, cache, setup)
            if report:
                report(name)
    return outcomes
