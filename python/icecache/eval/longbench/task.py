"""A LongBench set as a task, in one of three protocols."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from icecache.errors import ConfigError, DataError
from icecache.eval.longbench.documents import HUB, Document, documents
from icecache.eval.longbench.metrics import METRICS, NAMES, code_difflib
from icecache.eval.longbench.sets import LongBenchSet
from icecache.eval.longbench.truncate import truncate_middle
from icecache.eval.render import encode, render
from icecache.eval.task import DataDir, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Protocol = Literal["official", "authors", "clean"]
DEFAULT_TOKENS: Final = 31_500
"""`max_length` of the published script for models of 32k tokens."""
LLAMA_3_SYSTEM: Final = "You are a helpful assistant."
"""System message that the paper's authors give to Llama 3 models."""


@dataclass(frozen=True, slots=True)
class LongBenchTask:
    """One set.

    Parameters
    ----------
    of : LongBenchSet
        The set.
    protocol : {"official", "authors", "clean"}, default="official"
        "official": LongBench's script. "authors": the paper's script, which gives Llama 3 a system message and puts a
        second `<bos>` before a rendered template. "clean": as official, but the length covers template and answer too,
        and few-shot and code sets stop at a line break as the template asks.
    """

    of: LongBenchSet
    protocol: Protocol = "official"

    @property
    def name(self) -> str:
        """The set's, with the protocol in front unless it is the official one."""
        return self.of.name if self.protocol == "official" else f"{self.protocol}/{self.of.name}"

    @property
    def suite(self) -> str:
        """One suite a protocol."""
        return "longbench" if self.protocol == "official" else f"longbench-{self.protocol}"

    @property
    def metric(self) -> str:
        """What the score is."""
        return NAMES[self.of.metric]

    def samples(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        length: int | None,
        n: int,
        seed: int,
        data: DataDir | None,
    ) -> Iterator[Sample]:
        """Give the first `n` documents of the data (the seed plays no part).

        Longer prompts than `length` tokens (None: 31500) lose their middle. As published, neither the chat template nor
        the answer counts towards the length, unless the protocol is "clean".

        Raises
        ------
        DataError
            If the data is missing or has another form.
        ConfigError
            If the length leaves no room.
        """
        limit = length = DEFAULT_TOKENS if length is None else length
        if self.protocol == "clean":
            empty = Sample(self.name, "empty", "", "x", ("",), 1, chat=self.of.chat)
            limit -= self.of.new_tokens + sum(map(len, encode(render(empty, tokenizer), tokenizer)))
        if limit < 2:
            msg = f"{self.name} needs more than {length} tokens: {length - limit} of them are template and answer"
            raise ConfigError(msg)
        meta: dict[str, str | int | float] = {"length": length, "protocol": self.protocol}
        if data is None:
            meta["source"] = HUB
        for document in itertools.islice(documents(self.of, data), n):
            yield self._sample(tokenizer, document, limit, f"{length}-{seed}-{document.row - 1}", meta)

    def _sample(
        self,
        tokenizer: PreTrainedTokenizerBase,
        document: Document,
        limit: int,
        identity: str,
        shared: Mapping[str, str | int | float],
    ) -> Sample:
        is_first_line = self.of.first_line and self.protocol == "clean"
        context, question, cut = truncate_middle(
            tokenizer,
            self.of.before + document.context,
            self.of.after.replace("{input}", document.question),
            limit,
        )
        meta: dict[str, str | int | float] = {**shared, "truncated": int(cut)}
        if document.classes:
            meta["classes"] = json.dumps(document.classes, ensure_ascii=False)
        is_samsum = self.of.name == "samsum"
        is_authors = self.protocol == "authors"
        sample = Sample(
            task=self.name,
            id=identity,
            context=context,
            question=question,
            references=document.answers,
            max_new_tokens=self.of.new_tokens,
            stop=("\n",) if is_samsum or is_first_line else (),
            chat=self.of.chat,
            meta=meta,
            min_new_tokens=int(is_samsum or is_first_line),
            system=LLAMA_3_SYSTEM if is_authors and _is_llama_3(tokenizer) else "",
            double_bos=is_authors,
        )
        self.score(document.answers[0], sample)  # what the score lacks must show before a model runs
        return sample

    def score(self, prediction: str, sample: Sample) -> float:
        """Best score over the references.

        Raises
        ------
        DataError
            If a package that defines the score is not installed.
        """
        return self._best(prediction, sample, self.of.metric)

    def grades(self, prediction: str, sample: Sample) -> Mapping[str, float]:
        """Edit similarity by difflib for the code sets: what the published requirements lead to."""
        return {"difflib": self._best(prediction, sample, "difflib")} if self.of.metric == "code" else {}

    def _best(self, prediction: str, sample: Sample, metric: str) -> float:
        if self.of.first_line:
            prediction = prediction.lstrip("\n").split("\n")[0]
        classes = json.loads(str(sample.meta.get("classes", "[]")))
        score = code_difflib if metric == "difflib" else METRICS[metric]
        try:
            return max(score(prediction, reference, classes) for reference in sample.references)
        except IndexError as error:
            msg = f"{sample.task}/{sample.id}: the references name no paragraph: {sample.references}"
            raise DataError(msg) from error


def _is_llama_3(tokenizer: PreTrainedTokenizerBase) -> bool:
    name = str(tokenizer.name_or_path).lower()
    return "llama" in name and "3" in name
