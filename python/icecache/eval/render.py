"""Samples as text and as tokens, with the place where context ends and question begins.

The prompt is tokenised in one piece, so that the model sees the very tokens it would see without a boundary; a token
that reaches over the boundary belongs to the question. Both setups use the same tokens.
"""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from icecache.errors import DataError
from icecache.eval.task import Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BOUNDARY: Final = "\ue000"
"""A private-use character: marks the boundary in texts that pass through a chat template or another engine."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A prompt as text.

    Parameters
    ----------
    context, question : str
        The two parts; the prompt is one behind the other.
    templated : bool
        A chat template wrote it, special tokens included.
    """

    context: str
    question: str
    templated: bool = False

    @property
    def sha256(self) -> str:
        """Of the whole prompt, 64 hexadecimal digits."""
        return hashlib.sha256((self.context + self.question).encode()).hexdigest()


@dataclass(frozen=True, slots=True)
class Prompt:
    """A sample ready to run; its context's text is dropped.

    Parameters
    ----------
    sample : Sample
        With an empty context.
    context, question : tuple of int
        Token ids; at least one of the question.
    turns : tuple of tuple of int
        Token ids of each turn's given text.
    bare : tuple of int
        Token ids of the context when the sample has none: template, system message, `<bos>`.
    sha256 : str
        Of the rendered prompt.
    """

    sample: Sample
    context: tuple[int, ...]
    question: tuple[int, ...]
    turns: tuple[tuple[int, ...], ...]
    bare: tuple[int, ...]
    sha256: str

    @property
    def shape(self) -> tuple[int, int]:
        """Tokens of context and question: what the samples of a batch share."""
        return len(self.context), len(self.question)

    @property
    def n_most(self) -> int:
        """Most tokens that the sample can come to, answers included."""
        answers = self.sample.max_new_tokens + sum(turn.max_new_tokens for turn in self.sample.turns)
        return sum(self.shape) + sum(map(len, self.turns)) + answers


def render(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> Rendered:
    """Write a sample's prompt, through the tokenizer's chat template where there is one and the sample wants it.

    Raises
    ------
    DataError
        If a text holds the boundary character, or the template drops or repeats the user's message.
    """
    parts = (sample.context, sample.question, sample.system, *(text for shot in sample.shots for text in shot))
    if any(BOUNDARY in text for text in parts):
        msg = f"sample {sample.task}/{sample.id} holds U+E000, which marks the boundary of context and question"
        raise DataError(msg)
    if not (sample.chat and tokenizer.chat_template):
        shots = "".join(f"{user}{assistant}\n\n" for user, assistant in sample.shots)
        return Rendered(shots + sample.context, sample.question + sample.answer_prefix)
    messages = [{"role": "system", "content": sample.system}] if sample.system else []
    for user, assistant in sample.shots:
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    messages.append({"role": "user", "content": sample.context + BOUNDARY + sample.question})
    # Qwen3's template has a thinking mode, switched off as the paper's authors do; other templates ignore the argument.
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)
    pieces = str(text).split(BOUNDARY)
    if len(pieces) != 2:
        msg = f"the chat template wrote the user's message {len(pieces) - 1} times, expected once"
        raise DataError(msg)
    return Rendered(pieces[0], pieces[1] + sample.answer_prefix, templated=True)


def encode(
    rendered: Rendered, tokenizer: PreTrainedTokenizerBase, *, double_bos: bool = False
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Token ids of context and question.

    Special tokens are those the template wrote, or else those the tokenizer adds; where it has a `<bos>` that it does
    not add by itself, one is put in front.

    Parameters
    ----------
    rendered : Rendered
        The prompt.
    tokenizer : PreTrainedTokenizerBase
        Of the model.
    double_bos : bool, default=False
        Add special tokens to a rendered template, too.
    """
    special = not rendered.templated or double_bos
    text, boundary = rendered.context + rendered.question, len(rendered.context)
    if not tokenizer.is_fast:
        warnings.warn("a slow tokenizer has no offsets: context and question are tokenised apart", stacklevel=2)
        ids = list(tokenizer(rendered.context, add_special_tokens=special)["input_ids"])
        first = len(ids)
        ids += tokenizer(rendered.question, add_special_tokens=False)["input_ids"]
    else:
        encoded = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True, verbose=False)
        ids = list(encoded["input_ids"])
        # A special token at the end (T5's, say) has an empty span at 0 and would end the prompt: none is expected.
        ends = [stop for _, stop in encoded["offset_mapping"]]
        first = next((i for i, stop in enumerate(ends) if stop > boundary), len(ids))
    bos = tokenizer.bos_token_id
    if special and bos is not None and (not ids or ids[0] != bos):
        ids, first = [bos, *ids], first + 1
    return tuple(ids[:first]), tuple(ids[first:])


def prepare(sample: Sample, tokenizer: PreTrainedTokenizerBase) -> Prompt:
    """Make a sample ready to run.

    Raises
    ------
    DataError
        If the question has no token, or as in `render`.
    """
    rendered = render(sample, tokenizer)
    context, question = encode(rendered, tokenizer, double_bos=sample.double_bos)
    if not question:
        msg = f"sample {sample.task}/{sample.id} has no token of a question"
        raise DataError(msg)
    turns = tuple(tuple(tokenizer(turn.given, add_special_tokens=False)["input_ids"]) for turn in sample.turns)
    empty = replace(sample, context="")
    bare, _ = encode(render(empty, tokenizer), tokenizer, double_bos=sample.double_bos)
    return Prompt(empty, context, question, turns, bare, rendered.sha256)
