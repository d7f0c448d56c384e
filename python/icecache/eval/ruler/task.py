"""A RULER task: a form, the length in tokens, a seed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from icecache.errors import ConfigError
from icecache.eval.render import encode, render
from icecache.eval.ruler.fit import largest, smaller
from icecache.eval.ruler.form import Draft, Form
from icecache.eval.ruler.questions import Questions
from icecache.eval.ruler.score import match_all, match_any
from icecache.eval.task import DataDir, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_LENGTH: Final = 4096


@dataclass(frozen=True, slots=True)
class RulerTask:
    """One of the task forms, in a length that is asked for.

    Parameters
    ----------
    name : str
        RULER's, or with "_synthetic" behind where haystack or facts are not RULER's.
    make : callable
        Gives the form; reads data files.
    any_reference : bool, default=False
        Score 1 for any reference (questions) instead of the share of all.
    suite : str
        Name of the suite.
    """

    name: str
    make: Callable[[DataDir | None], Form]
    any_reference: bool = False
    suite: str = "ruler"

    @property
    def metric(self) -> str:
        """What the score is."""
        return "any reference in the answer" if self.any_reference else "share of references in the answer"

    def samples(
        self, tokenizer: PreTrainedTokenizerBase, *, length: int | None, n: int, seed: int, data: DataDir | None
    ) -> Iterator[Sample]:
        """Give samples whose prompt and answer fit `length` tokens (None: 4096); see :class:`icecache.eval.task.Task`.

        The size of the haystack is searched once, with the first sample; a later one that would be too long takes
        steps back. Every sample has its own random numbers, so it does not depend on how many are asked for.

        Raises
        ------
        ConfigError
            If the length is too short for the form.
        DataError
            If a file is missing or has another form.
        """
        length = DEFAULT_LENGTH if length is None else length
        form = self.make(data)
        overhead = form.new_tokens + _template_tokens(self.name, tokenizer)

        def tokens(draft: Draft) -> int:
            return len(tokenizer(draft.text).input_ids) + overhead

        def draft(index: int, size: int) -> Draft:
            rng = random.Random(f"{self.name}:{length}:{seed}:{index}")
            return form.draft(rng, size, length, index)

        step = form.step(length)
        most = form.most if form.most is None or form.most >= form.least else form.least
        try:
            fitted = largest(lambda s: tokens(draft(0, s)) <= length, least=form.least, step=step, most=most)
        except ConfigError as error:
            msg = f"{self.name} does not fit {length} tokens, of which {overhead} are answer and template: {error}"
            raise ConfigError(msg) from error
        for index in range(min(n, len(form.collection.questions)) if isinstance(form, Questions) else n):
            size: int | None = fitted
            while size is not None and (written := draft(index, size)) and tokens(written) > length:
                size = smaller(size, least=form.least, step=step)
            if size is None:
                continue  # a question whose own documents are too long; RULER's search would not end
            meta = {**written.meta, "length": length, "tokens": tokens(written), "size": size}
            yield Sample(
                task=self.name,
                id=f"{length}-{seed}-{index}",
                context=written.context,
                question=written.question,
                answer_prefix=written.answer_prefix,
                references=written.references,
                max_new_tokens=form.new_tokens,
                meta=meta,
            )

    def score(self, prediction: str, sample: Sample) -> float:
        """Share of the references that the answer contains, or whether it contains any."""
        return (match_any if self.any_reference else match_all)(prediction, sample.references)


def _template_tokens(name: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens that chat template and `<bos>` add to a prompt."""
    word = Sample(name, "template", "", "x", (), 1)
    context, question = encode(render(word, tokenizer), tokenizer)
    return len(context) + len(question) - len(tokenizer("x").input_ids)
