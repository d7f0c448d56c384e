"""Our tasks as tasks of lm-evaluation-harness: its command, its logs, our samples and our scores."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from icecache.eval.harness.marks import mark
from icecache.eval.harness.model import OURS
from icecache.eval.task import DataDir, Graded, Sample, Task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What the prompt's string does not say; the same for all samples of a task.
BESIDE = ("chat", "system", "shots", "min_new_tokens", "double_bos")


def as_lm_eval_task(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    *,
    length: int | None = None,
    n: int,
    seed: int = 0,
    data: DataDir | None = None,
) -> dict[str, object]:
    """Give a task's configuration for `lm_eval.simple_evaluate(tasks=[...])`.

    Parameters
    ----------
    task : Task
        One of :data:`icecache.eval.suites.SUITES`; tasks with turns cannot be told to the harness.
    tokenizer, length, n, seed, data
        As :meth:`icecache.eval.task.Task.samples` wants them.

    Returns
    -------
    dict
        The metric is "score", beside the task's further grades. Prompts are those of `icecache eval run` only with
        :class:`icecache.eval.harness.model.IceHFLM` and `apply_chat_template=False`: it applies templates itself.

    Raises
    ------
    ValueError
        If the samples have turns, or do not share answer length, stops or the other settings of generation.
    """
    samples = list(task.samples(tokenizer, length=length, n=n, seed=seed, data=data))
    settings = {json.dumps(_settings(sample)) for sample in samples}
    if len(settings) != 1 or any(sample.turns for sample in samples):
        msg = f"{task.name} cannot run in the harness: its samples have turns or differ in {', '.join(BESIDE)}"
        raise ValueError(msg)
    by_id = {sample.id: dataclasses.replace(sample, context="") for sample in samples}
    rows = [{"id": sample.id, "text": mark(sample), "target": sample.references[0]} for sample in samples]

    def dataset(**_: object) -> Mapping[str, object]:
        from datasets import Dataset

        return {"test": Dataset.from_list(rows)}

    def results(doc: Mapping[str, str], answers: list[str]) -> dict[str, float]:
        sample, answer = by_id[doc["id"]], answers[0]
        grades = dict(task.grades(answer, sample)) if isinstance(task, Graded) else {}
        return {"score": task.score(answer, sample), **grades}

    metrics = results({"id": samples[0].id}, [""])
    return {
        "task": f"icecache_{task.name}".replace("/", "_"),
        "custom_dataset": dataset,
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": lambda doc: doc["text"],
        "doc_to_target": lambda doc: doc["target"],
        "process_results": results,
        "generation_kwargs": {"do_sample": False, **_settings(samples[0])},
        "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in metrics],
        "num_fewshot": 0,
    }


def _settings(sample: Sample) -> dict[str, object]:
    return {
        "until": list(sample.stop),
        "max_gen_toks": sample.max_new_tokens,
        OURS: {name: getattr(sample, name) for name in BESIDE},
    }
