"""Passkey retrieval with the Landmark prompt (arXiv 2305.16300), which Quest, ArkVale and IceCache use, too.

A number in repeated filler, at 20 depths. Published runs cut the filler by characters (38,000 for 10k tokens) and grade
in two ways: by the first number of the answer, or by its last tokens.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from icecache.eval.task import DataDir, Sample, Suite

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TASK_LINE: Final = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize them. "
    "I will quiz you about the important information there."
)
FILLER: Final = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
QUESTION: Final = "What is the pass key? The pass key is"
DEPTHS: Final = 20
MOST: Final = 50_000
# Characters that the IceCache authors' script cuts for 10k tokens.
CHARACTERS, PER_TOKENS = 38_000, 10_240


@dataclass(frozen=True, slots=True)
class Passkey:
    """A passkey task.

    Parameters
    ----------
    name : str
        Of the task.
    by_tokens : bool
        Fill up to the length in tokens of the model's tokenizer; otherwise by characters, 38,000 for 10,240 tokens.
    suite, metric : str
        See :class:`icecache.eval.task.Task`.
    """

    name: str
    by_tokens: bool
    suite: str = "passkey"
    metric: str = "first number"

    def samples(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        length: int | None,
        n: int,
        seed: int,
        data: DataDir | None,  # noqa: ARG002 - needs no files
    ) -> Iterator[Sample]:
        """Give samples, depth by depth; after 20 the depths come again with other numbers."""
        tokens = length or SUITE.lengths[0]
        filler = _by_tokens(tokenizer, tokens) if self.by_tokens else _by_characters(tokens)
        for index in range(n):
            number = random.Random(f"passkey {seed} {tokens} {index}").randint(1, MOST)
            depth = (index % DEPTHS) / (DEPTHS - 1)
            # One token more than the number by itself: some tokenizers write a blank first.
            room = len(tokenizer(str(number), add_special_tokens=False)["input_ids"]) + 1
            yield Sample(
                task=self.name,
                id=f"{tokens}-{seed}-{index}",
                context=filler(depth, number, room),
                question=QUESTION,
                references=(str(number),),
                max_new_tokens=room,
                chat=False,
                meta={"length": tokens, "depth": round(depth, 4)},
            )

    def score(self, prediction: str, sample: Sample) -> float:
        """1 if the first number of the answer is the pass key (Quest, Landmark)."""
        found = re.search(r"\d+", prediction)
        return float(found is not None and int(found.group()) == int(sample.references[0]))

    def grades(self, prediction: str, sample: Sample) -> Mapping[str, float]:
        """Grade as IceCache does: the answer's last tokens are the number.

        Their script compares the last tokens of an answer one token longer than the number; the answer's text ends with
        the number exactly then, but for tokenizers that write a number in several ways.
        """
        return {"last tokens": float(prediction.endswith(sample.references[0]))}


def context_of(n_characters: int, depth: float, number: int) -> str:
    """Write the context.

    Parameters
    ----------
    n_characters : int
        Of filler, before and behind the number together.
    depth : float
        Share of it before the number, 0 to 1.
    number : int
        The pass key.
    """
    before = int(n_characters * depth)
    endless = FILLER * (n_characters // len(FILLER) + 1)
    key = f"The pass key is {number}. Remember it. {number} is the pass key."
    return f"{TASK_LINE}\n{endless[:before]}\n{key}\n{endless[: n_characters - before]}\n"


def _by_characters(tokens: int) -> Callable[[float, int, int], str]:
    n_characters = tokens * CHARACTERS // PER_TOKENS
    return lambda depth, number, room: context_of(n_characters, depth, number)  # noqa: ARG005 - one signature


def _by_tokens(tokenizer: PreTrainedTokenizerBase, tokens: int) -> Callable[[float, int, int], str]:
    def count(text: str) -> int:
        return len(tokenizer(text, verbose=False)["input_ids"]) + 1  # a <bos> that the runner may add

    # One stretch of filler tells the characters a token takes; the rest is a correction or two.
    per_token = 100 * len(FILLER) / max(1, count(FILLER * 100))

    def fill(depth: float, number: int, room: int) -> str:
        n_characters = int(tokens * per_token)
        while n_characters > 0:
            text = context_of(n_characters, depth, number)
            excess = count(text + QUESTION) + room - tokens
            if excess <= 0:
                return text
            n_characters -= max(1, int(excess * per_token))
        return context_of(0, depth, number)

    return fill


SUITE: Final = Suite(
    name="passkey",
    summary="one number in repeated filler, lengths x 20 depths",
    tasks=(Passkey("passkey-characters", by_tokens=False), Passkey("passkey-tokens", by_tokens=True)),
    samples=DEPTHS,
    lengths=(10_240, 20_480, 30_720),
    default_tasks=("passkey-characters",),
)
