"""GSM8K in the wordings of lm-evaluation-harness, and in that of the paper's authors."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from icecache.errors import DataError
from icecache.eval.gsm8k import grade
from icecache.eval.gsm8k.exemplars import EXEMPLARS
from icecache.eval.gsm8k.problems import HUB, problems
from icecache.eval.task import DataDir, Sample

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NEW_TOKENS: Final = 256
LLAMA: Final = (
    "Given the following problem, reason and give a final answer to the problem.\nProblem: {}\n"
    'Your response should end with "The final answer is [answer]" where [answer] is the response to the problem.\n'
)
STOP: Final = ("Q:", "</s>", "<|im_end|>")
LLAMA_STOP: Final = ("<|eot_id|>", "<|start_header_id|>user<|end_header_id|>", *STOP)
PROMPT_FILE: Final = "gsm8k_prompt_formal.txt"
NEXT_QUESTION: Final = "\nQuestion: "


@dataclass(frozen=True, slots=True)
class Gsm8kCot:
    """`gsm8k_cot`: eight examples as "Q: ... A: ...", no chat template. The score is the flexible one."""

    name: str = "gsm8k_cot"
    suite: str = "gsm8k"
    metric: str = "exact match, last number"

    def samples(
        self,
        tokenizer: PreTrainedTokenizerBase,  # noqa: ARG002 - the prompt is as long as it is
        *,
        length: int | None,  # noqa: ARG002
        n: int,
        seed: int,
        data: DataDir | None,
    ) -> Iterator[Sample]:
        """Give the first `n` problems (the seed plays no part); see :class:`icecache.eval.task.Task`."""
        context = "".join(f"Q: {q}\nA: {why} The answer is {result}.\n\n" for q, why, result in EXEMPLARS)
        form = Sample(self.name, "", context, "Q: {}\nA:", (), NEW_TOKENS, STOP, chat=False, meta=_source(data))
        yield from _filled(form, n, seed, data)

    def score(self, prediction: str, sample: Sample) -> float:
        """1 if the last number is the result."""
        return grade.equal(grade.flexible(prediction), sample.references[0])

    def grades(self, prediction: str, sample: Sample) -> Mapping[str, float]:
        """1 if the number behind "The answer is" is the result."""
        return {"strict": grade.equal(grade.strict(prediction), sample.references[0])}


@dataclass(frozen=True, slots=True)
class Gsm8kLlama:
    """`gsm8k_cot_llama`: the examples as a conversation in the chat template, "The final answer is"."""

    name: str = "gsm8k_cot_llama"
    suite: str = "gsm8k"
    metric: str = "exact match, last number"

    def samples(
        self,
        tokenizer: PreTrainedTokenizerBase,  # noqa: ARG002 - the prompt is as long as it is
        *,
        length: int | None,  # noqa: ARG002
        n: int,
        seed: int,
        data: DataDir | None,
    ) -> Iterator[Sample]:
        """Give the first `n` problems (the seed plays no part); see :class:`icecache.eval.task.Task`."""
        shots = tuple((LLAMA.format(q), f"{why} The final answer is {result}") for q, why, result in EXEMPLARS)
        form = Sample(self.name, "", "", LLAMA, (), NEW_TOKENS, LLAMA_STOP, shots=shots, meta=_source(data))
        yield from _filled(form, n, seed, data)

    def score(self, prediction: str, sample: Sample) -> float:
        """1 if the last number is the result."""
        return grade.equal(grade.flexible(prediction), sample.references[0])

    def grades(self, prediction: str, sample: Sample) -> Mapping[str, float]:
        """1 if the number behind "The final answer is" is the result."""
        return {"strict": grade.equal(grade.strict_final(prediction), sample.references[0])}


@dataclass(frozen=True, slots=True)
class Gsm8kAuthors:
    """The paper's script, and PQCache's: a file of complexity-based examples, about 3k tokens; no chat template."""

    name: str = "authors/gsm8k"
    suite: str = "gsm8k-authors"
    metric: str = "last number equal"

    def samples(
        self,
        tokenizer: PreTrainedTokenizerBase,  # noqa: ARG002 - the prompt is as long as it is
        *,
        length: int | None,  # noqa: ARG002
        n: int,
        seed: int,
        data: DataDir | None,
    ) -> Iterator[Sample]:
        """Give the first `n` problems (the seed plays no part); see :class:`icecache.eval.task.Task`.

        Raises
        ------
        DataError
            If there is no folder, or no file with the prompt in it.
        """
        question = NEXT_QUESTION + "{}\n"
        form = Sample(self.name, "", _prompt(data), question, (), NEW_TOKENS, (NEXT_QUESTION,), chat=False)
        yield from _filled(form, n, seed, data)

    def score(self, prediction: str, sample: Sample) -> float:
        """1 if the last number has the value of the result."""
        return grade.authors_equal(prediction, sample.references[0])


def _filled(form: Sample, n: int, seed: int, data: DataDir | None) -> Iterator[Sample]:
    """Write the first `n` problems into `form`, whose question says where."""
    for problem in itertools.islice(problems(data), n):
        question, row = form.question.format(problem.question), f"{seed}-{problem.row - 1}"
        yield replace(form, id=row, question=question, references=(problem.result,))


def _source(data: DataDir | None) -> dict[str, str | int | float]:
    """Say that the problems came from the hub; hashes of files are in the manifest."""
    return {"source": HUB} if data is None else {}


def _prompt(data: DataDir | None) -> str:
    needed = (
        f"authors/gsm8k needs {PROMPT_FILE} in --data-dir: the prompt of complexity-based chain of thought (126 lines, "
        "10.8k characters; published with chain-of-thought-hub and with PQCache); gsm8k_cot needs no such file"
    )
    if data is None:
        raise DataError(needed)
    try:
        text = data.find(PROMPT_FILE, f"gsm8k/{PROMPT_FILE}").read_text(encoding="utf-8")
    except DataError as error:
        raise DataError(needed) from error
    if "Question: " not in text:
        msg = f"{PROMPT_FILE} holds no 'Question: '; {needed}"
        raise DataError(msg)
    return text
