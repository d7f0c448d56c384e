"""Greedy answers of a batch on a cache that holds the prefilled context, one token of every row a step."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from icecache.eval.record import Setup
from icecache.eval.render import Prompt
from icecache.hf.names import cache_argument

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Answer:
    """What came out for one sample.

    Parameters
    ----------
    text : str
        Decoded, cut at a stop string, given turns included.
    tokens : tuple of int
        As produced and given, the end-of-sequence token left out.
    n_generated : int
        Tokens the model produced.
    """

    text: str
    tokens: tuple[int, ...]
    n_generated: int


@dataclass(frozen=True, slots=True)
class Timing:
    """Wall time of a batch.

    Parameters
    ----------
    first_s : float
        From the first token fed to the first answer token.
    rest_s : float
        All later steps.
    n_rest : int
        How many these were.
    """

    first_s: float
    rest_s: float
    n_rest: int


class Row:
    """The answer of one row as it grows: what is fed next, and whether it is over."""

    def __init__(self, prompt: Prompt, tokenizer: PreTrainedTokenizerBase, ends: frozenset[int]) -> None:
        sample = prompt.sample
        self._prompt, self._tokenizer, self._ends = prompt, tokenizer, ends
        self._turns = deque(zip(prompt.turns, (turn.max_new_tokens for turn in sample.turns), strict=True))
        self._given: deque[int] = deque()
        self._answer: list[int] = []
        self._room = sample.max_new_tokens
        self._pieces: list[str] = []
        self._tokens: list[int] = []
        self.n_generated = 0
        self.is_over = False
        alone = (tokenizer(stop, add_special_tokens=False)["input_ids"] for stop in sample.stop)
        self._early = ends | {ids[0] for ids in alone if len(ids) == 1}

    def forbidden(self) -> frozenset[int]:
        """Tokens that must not come next: ends of an answer that is still too short."""
        if self.is_over or self._given or self.n_generated >= self._prompt.sample.min_new_tokens:
            return frozenset()
        return self._early

    def push(self, predicted: int) -> int:
        """Take the model's prediction; return the token to feed next (any, once the row is over)."""
        if self.is_over:
            return predicted
        if self._given:
            token = self._given.popleft()
            self._tokens.append(token)
            return token
        ended = predicted in self._ends
        if not ended:
            self._answer.append(predicted)
            self._tokens.append(predicted)
            self.n_generated += 1
            self._room -= 1
        if ended or self._room == 0 or self._stopped():
            self._close_answer()
            if ended and not self.is_over:
                return self.push(predicted)  # the end is not fed: the given text follows at once
        return predicted

    def _text(self) -> str:
        return str(self._tokenizer.decode(self._answer, skip_special_tokens=True))

    def _stopped(self) -> bool:
        stops = self._prompt.sample.stop
        if not stops or self.n_generated < self._prompt.sample.min_new_tokens:
            return False
        text = self._text()
        return any(stop in text for stop in stops)

    def _close_answer(self) -> None:
        text = self._text()
        for stop in self._prompt.sample.stop:
            text = text.partition(stop)[0]
        self._pieces.append(text)
        if not self._turns:
            self.is_over = True
            return
        given, self._room = self._turns.popleft()
        self._given, self._answer = deque(given), []
        self._pieces.append(str(self._tokenizer.decode(list(given))))

    def answer(self) -> Answer:
        """Give the answer so far."""
        return Answer(" ".join(self._pieces), tuple(self._tokens), self.n_generated)


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Tokens that end an answer, by generation config and tokenizer."""
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    several = configured if isinstance(configured, (list, tuple)) else [configured]
    return frozenset(token for token in (*several, tokenizer.eos_token_id) if token is not None)


def prefill_tokens(prompt: Prompt, setup: Setup) -> tuple[int, ...]:
    """Give what is prefilled densely: setup A holds the question, too, but for its last token."""
    return prompt.context + prompt.question[:-1] if setup == "A" else prompt.context


def step(model: PreTrainedModel, tokens: Tensor, cache: Cache) -> Tensor:
    """Feed one token a row, `(B, 1)`; return its logits `(B, vocabulary)`."""
    logits: Tensor = model(input_ids=tokens, use_cache=True, **cache_argument(cache)).logits
    return logits[:, -1]


@torch.inference_mode()
def answer_greedily(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    cache: Cache,
    setup: Setup,
) -> tuple[list[Answer], Timing]:
    """Ask and answer.

    Parameters
    ----------
    model : PreTrainedModel
        Attending as the arm wants it.
    tokenizer : PreTrainedTokenizerBase
        Of the model.
    prompts : sequence of Prompt
        One batch, of one shape.
    cache : Cache
        Holds `prefill_tokens` of every row; grows.
    setup : {"A", "B"}
        What the cache holds.

    Returns
    -------
    answers : list of Answer
        One a row. Rows that are over wait for the others.
    timing : Timing
        Of the batch.
    """
    ends = end_tokens(model, tokenizer)
    rows = [Row(prompt, tokenizer, ends) for prompt in prompts]
    asked = torch.tensor([p.question[-1:] if setup == "A" else p.question for p in prompts], device=model.device)
    began = time.perf_counter()
    for i in range(asked.shape[1]):
        logits = step(model, asked[:, i : i + 1], cache)
    first_s, n_rest = 0.0, 0
    while True:
        tokens = _advance(rows, logits)
        first_s = first_s or time.perf_counter() - began
        if all(row.is_over for row in rows):
            break
        logits = step(model, torch.tensor(tokens, device=model.device)[:, None], cache)
        n_rest += 1
    rest_s = time.perf_counter() - began - first_s
    return [row.answer() for row in rows], Timing(first_s, rest_s, n_rest)


def _advance(rows: Sequence[Row], logits: Tensor) -> list[int]:
    for i, row in enumerate(rows):
        if banned := row.forbidden():
            logits[i, list(banned)] = -torch.inf
    predicted = logits.argmax(-1).tolist()
    return [row.push(token) for row, token in zip(rows, predicted, strict=True)]
