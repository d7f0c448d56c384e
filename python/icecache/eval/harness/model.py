"""`IceHFLM`: lm-evaluation-harness's model class, answering with a cache policy and under a budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from lm_eval.models.huggingface import HFLM
from tqdm import tqdm

from icecache.config import IceConfig
from icecache.errors import ConfigError
from icecache.eval.arms import Arm, DenseLayers, dense_layers
from icecache.eval.ask import ask
from icecache.eval.harness.marks import hold_conversation, is_without_template, read_sample
from icecache.eval.longbench.truncate import truncate_middle
from icecache.eval.prefill import prefill, what_to_note
from icecache.eval.record import ArmStats, Setup
from icecache.eval.render import Prompt, prepare
from icecache.eval.task import Sample

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OURS: Final = "icecache"
"""Key of the generation arguments under which our tasks say what the prompt's string cannot."""
FULL: Final = Arm("full")
SHORTEST: Final = 16
"""A prompt is not cut to fewer tokens than this."""
NOT_SERVED: Final = frozenset({"no-context", "full-eager"})


@dataclass(frozen=True, slots=True)
class Served:
    """A request that was answered.

    Parameters
    ----------
    task : str
        Name in the harness.
    doc : int
        Number of the document.
    arm : str
        Such as "icecache@64".
    setup : {"A", "B"}
        Whether the question was part of the dense prefill.
    prompt_sha256 : str
        Of the rendered prompt.
    n_prompt, n_generated : int
        Tokens.
    truncated : bool
        The middle of the prompt was cut out.
    stats : ArmStats
        Accounting and times.
    """

    task: str
    doc: int
    arm: str
    setup: Setup
    prompt_sha256: str
    n_prompt: int
    n_generated: int
    truncated: bool
    stats: ArmStats


class IceHFLM(HFLM):  # type: ignore[misc]
    """A model in memory, for `lm_eval.simple_evaluate(model=...)`; one request at a time.

    What differs from `HFLM`: a prompt that is too long loses its middle, not its beginning; the chat template is
    applied late, so that the six sets of LongBench that must not have it do without; a `<bos>` stands there once; it is
    known where the question begins (a mark, or the task's wording), so that it can be sparse (setup B).

    Parameters
    ----------
    model : PreTrainedModel
        Not wrapped.
    tokenizer : PreTrainedTokenizerBase
        Of the model.
    arm : Arm, default=Arm("full")
        Policy and budget. :meth:`use` changes it without loading anything.
    setup : {"A", "B"}, default="B"
        A: the question is part of the dense prefill. B: question and answer attend sparsely.
    base : IceConfig, optional
        Settings of all arms.
    dense : {"matched", "published"}, default="matched"
        Layers that stay dense: the same for all arms (none below 16 layers, else the first two), or each policy's own.
    max_length : int, optional
        Most tokens of prompt and answer; default: the model's.

    Attributes
    ----------
    served : list of Served
        Every request that was answered, in order.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        arm: Arm = FULL,
        setup: Setup = "B",
        base: IceConfig | None = None,
        dense: DenseLayers = "matched",
        max_length: int | None = None,
    ) -> None:
        super().__init__(pretrained=model, tokenizer=tokenizer, batch_size=1, max_length=max_length)
        self.base, self.dense = base or IceConfig(dense_below=0), dense
        self.served: list[Served] = []
        self.setup: Setup = setup
        self.use(arm)

    def use(self, arm: Arm, setup: Setup | None = None) -> None:
        """Answer with another policy from now on.

        Raises
        ------
        ConfigError
            If the arm is one that only `icecache eval run` has.
        """
        if arm.policy in NOT_SERVED:
            msg = f"arm must be full, exact or a policy with a budget here, got {arm.name}; icecache eval run has it"
            raise ConfigError(msg)
        self.arm = arm
        self.setup = setup or self.setup

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Keep the conversation until the request is answered: its task decides whether it gets the template."""
        return hold_conversation(chat_history, is_open=not add_generation_prompt)

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answer requests greedily.

        Raises
        ------
        ConfigError
            If a request wants sampling, or setup B and it is not known where its question begins.
        """
        answers = []
        for request in tqdm(requests, disable=disable_tqdm, desc=f"{self.arm.name}, setup {self.setup}"):
            text, options = request.args
            sample = read_sample(text, self._blank(request, options))
            answers.append(self._answer(sample, int(request.doc_id or 0)))
            self.cache_hook.add_partial("generate_until", (text, options), answers[-1])
        return answers

    def loglikelihood(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Score continuations; with full attention only, since they run in one pass, where a budget means nothing."""
        if self.arm != FULL:
            msg = f"tasks that score continuations have no decode steps: use full attention, got {self.arm.name}"
            raise ConfigError(msg)
        scores: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        return scores

    def _blank(self, request: Instance, options: Mapping[str, object]) -> Sample:
        task = str(request.task_name)
        if options.get("do_sample") or (options.get("temperature") and options.get("do_sample", True)):
            msg = f"{task}: answers are greedy here, got {dict(options)}"
            raise ConfigError(msg)
        until = options.get("until") or ()
        stop = (
            (until,) if isinstance(until, str) else tuple(map(str, until)) if isinstance(until, (list, tuple)) else ()
        )
        most = options.get("max_gen_toks", options.get("max_new_tokens", self.max_gen_toks))
        blank = Sample(task, str(request.doc_id), "", "", (), int(str(most)), stop, chat=not is_without_template(task))
        extra = options.get(OURS)
        if not isinstance(extra, Mapping):
            return blank
        return replace(blank, **{**extra, "shots": tuple(map(tuple, extra["shots"]))})

    def _answer(self, sample: Sample, doc: int) -> str:
        prompt, truncated = self._fit(sample)
        if self.setup == "B" and not (sample.context or sample.shots):
            msg = (
                f"{sample.task}: setup B needs to know where the question begins; put U+E000 before it, add the task's "
                "wording to icecache.eval.harness.marks.QUESTIONS, or use setup A"
            )
            raise ConfigError(msg)
        layers = dense_layers(self.arm, self.dense, self.model.config.get_text_config().num_hidden_layers)
        prefilled = prefill(self.model, [prompt], self.setup, notes=what_to_note([self.arm], self.base))
        base = replace(self.base, dense_layers=layers)
        (answer,), stats = ask(self.model, self.tokenizer, self.arm, base, prefilled)
        n_prompt = sum(prompt.shape)
        self.served.append(
            Served(
                *(sample.task, doc, self.arm.name, self.setup, prompt.sha256),
                *(n_prompt, answer.n_generated, truncated, stats),
            )
        )
        return answer.text

    def _fit(self, sample: Sample) -> tuple[Prompt, bool]:
        """Cut the middle out of the last message until prompt and answer fit the model."""
        prompt = prepare(sample, self.tokenizer)
        room, over = self.max_length, prompt.n_most - self.max_length
        if over <= 0:
            return prompt, False
        kept = len(self.tokenizer(sample.context + sample.question).input_ids) - over
        if kept < SHORTEST:
            msg = f"{sample.task}/{sample.id}: {prompt.n_most} tokens with the answer, of which {room} have room"
            raise ConfigError(msg)
        context, question, _ = truncate_middle(self.tokenizer, sample.context, sample.question, kept)
        return prepare(replace(sample, context=context, question=question), self.tokenizer), True
