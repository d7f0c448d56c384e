"""`icecache eval run`: every arm on every sample, written down as it comes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from icecache.config import NARROW_WINDOW_TOKENS, WINDOW_TOKENS, IceConfig
from icecache.errors import DataError
from icecache.eval.arms import Arm, dense_layers
from icecache.eval.ask import ask
from icecache.eval.folder import RunFolder, check_folder
from icecache.eval.greedy import Answer
from icecache.eval.machine import describe_run, this_command
from icecache.eval.model import ModelSource, check_device, load_model, open_model
from icecache.eval.options import EvalOptions
from icecache.eval.plan import Cell, batches, make_cells
from icecache.eval.prefill import Prefilled, attention_kernel, prefill, prefill_eagerly, what_to_note
from icecache.eval.progress import Progress, as_time
from icecache.eval.record import ArmStats, Json, Manifest, Record, Setup
from icecache.eval.render import Prompt
from icecache.eval.suites import SUITES, choose_tasks
from icecache.eval.task import DataDir, Graded, Task

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def say(line: str) -> None:
    """Write a line of progress."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


def run_eval(options: EvalOptions, *, write: Callable[[str], None] = say, command: Sequence[str] | None = None) -> Path:
    """Run every arm on every sample.

    Parameters
    ----------
    options : EvalOptions
        What to run.
    write : callable, optional
        Takes lines of progress.
    command : sequence of str, optional
        For the manifest; default: the command line of this process.

    Returns
    -------
    Path
        The folder of the results.

    Raises
    ------
    ConfigError, DataError
        Before the model is loaded, for everything that can be known by then; DataError later if the disk fails.
    """
    tasks = choose_tasks(options.suite, options.tasks)
    data = None if options.data_dir is None else DataDir(options.data_dir)
    check_device(options.device)
    check_folder(options.out, resume=options.resume)
    source = open_model(options.model)
    cells = make_cells(
        tasks,
        options.lengths,
        limit=options.limit,
        seed=options.seed,
        data=data,
        tokenizer=source.tokenizer,
        model_limit=source.limit,
        report=lambda label: write(f"making samples: {label}"),
    )
    part = describe_run(command or this_command(), options.device)
    manifest = Manifest(
        identity=identity(options, source),
        data={} if data is None else dict(data.hashes),
        labels={name: SUITES[name].label for name in options.suite if SUITES[name].label},
        metrics={task.name: task.metric for task in tasks},
        parts=(part,),
    )
    began = time.perf_counter()
    with RunFolder(options.out, manifest, resume=options.resume) as folder:
        jobs = plan_jobs(cells, options, folder.done)
        if jobs:
            model = load_model(source, options.device, options.dtype_name())
            Runner(model, source, options, folder, write).run(jobs)
        n_records = len(folder.done)
    write(f"{n_records} records in {options.out} after {as_time(time.perf_counter() - began)}")
    return options.out


def identity(options: EvalOptions, source: ModelSource) -> dict[str, Json]:
    """Say what all records of a folder share; tasks, arms and numbers of samples may grow when a run is resumed."""
    return {
        "model": Path(source.name).name,
        "model_sha256": source.sha256,
        "dtype": options.dtype_name(),
        "device": options.device.partition(":")[0],
        "seed": options.seed,
        "dense_layers": options.dense_layers,
        "settings": [*sorted(options.settings)],
        # Defaults that were others once: older records do not belong into the same table.
        "window_tokens": options.base_config().window_tokens or [WINDOW_TOKENS, NARROW_WINDOW_TOKENS],
    }


@dataclass(frozen=True, slots=True)
class Job:
    """A batch in a setup, and the arms that lack one of its records."""

    cell: Cell
    prompts: list[Prompt]
    setup: Setup
    arms: tuple[Arm, ...]

    @property
    def tokens(self) -> float:
        """Unit of progress: tokens of the batch."""
        return float(sum(prompt.n_most for prompt in self.prompts))


def plan_jobs(cells: Sequence[Cell], options: EvalOptions, done: set[tuple[str, str, str, Setup]]) -> list[Job]:
    """List what is left to do."""
    jobs = []
    for cell in cells:
        for setup in options.setup:
            for batch in batches(cell.prompts, options.batch):
                ids = [prompt.sample.id for prompt in batch]
                lacking = [
                    a for a in options.arms() if any((cell.task.name, i, a.name, setup) not in done for i in ids)
                ]
                if lacking:
                    jobs.append(Job(cell, batch, setup, tuple(lacking)))
    return jobs


class Runner:
    """Runs jobs with one model.

    Parameters
    ----------
    model : PreTrainedModel
        Not wrapped.
    source : ModelSource
        Its tokenizer and shape.
    options : EvalOptions
        Settings.
    folder : RunFolder
        Takes the records.
    write : callable
        Takes lines of progress.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        source: ModelSource,
        options: EvalOptions,
        folder: RunFolder,
        write: Callable[[str], None] = say,
    ) -> None:
        self.model, self.source, self.options, self.folder, self.write = model, source, options, folder, write
        self.base: IceConfig = options.base_config()

    def run(self, jobs: Sequence[Job]) -> None:
        """Run all jobs; each batch of each arm is on the disk when the next begins."""
        work: dict[str, float] = {}
        for job in jobs:
            for arm in job.arms:
                work[arm.name] = work.get(arm.name, 0.0) + job.tokens
        progress = Progress(work, self.write)
        for job in jobs:
            began = time.perf_counter()
            with self._memory_errors(job):
                for arm, records in self.run_job(job):
                    self.folder.add(records)
                    now = time.perf_counter()
                    progress.add(arm.name, job.tokens, now - began, f"{job.cell.label} {job.setup}, {arm.name}")
                    began = now

    @contextmanager
    def _memory_errors(self, job: Job) -> Iterator[None]:
        """Say what to do where the device's memory is too small."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            msg = (
                f"{job.cell.label}: the device's memory does not hold {len(job.prompts)} prompts of "
                f"{job.prompts[0].n_most} tokens; {len(self.folder.done)} records are safe: run it with --resume and a "
                "smaller --batch"
            )
            raise DataError(msg) from error

    def run_job(self, job: Job) -> Iterator[tuple[Arm, list[Record]]]:
        """Run the arms of a batch; they share one prefill."""
        shared: Prefilled | None = None
        for arm in job.arms:
            if arm.policy == "no-context":
                own = prefill(self.model, job.prompts, job.setup, bare=True)
            elif arm.policy == "full-eager":
                with attention_kernel(self.model, "eager"):
                    own = prefill_eagerly(self.model, job.prompts, job.setup)
            else:
                notes = what_to_note(job.arms, self.base)
                own = shared = shared or prefill(self.model, job.prompts, job.setup, notes=notes)
            answers, stats = self._attend(arm, own)
            yield (
                arm,
                [
                    self._record(job, arm, prompt, answer, stats)
                    for prompt, answer in zip(job.prompts, answers, strict=True)
                ],
            )

    def _attend(self, arm: Arm, prefilled: Prefilled) -> tuple[list[Answer], ArmStats]:
        dense = dense_layers(arm, self.options.dense_layers, self.source.n_layers)
        return ask(self.model, self.source.tokenizer, arm, replace(self.base, dense_layers=dense), prefilled)

    def _record(self, job: Job, arm: Arm, prompt: Prompt, answer: Answer, stats: ArmStats) -> Record:
        task: Task = job.cell.task
        sample = prompt.sample
        bare = arm.policy == "no-context"
        return Record(
            suite=task.suite,
            task=task.name,
            id=sample.id,
            arm=arm.name,
            setup=job.setup,
            prompt_sha256=prompt.sha256,
            n_prompt=len(prompt.bare if bare else prompt.context) + len(prompt.question),
            n_generated=answer.n_generated,
            prediction=answer.text,
            references=sample.references,
            score=float(task.score(answer.text, sample)),
            budget=arm.budget,
            seed=self.options.seed,
            stats=stats,
            grades=dict(task.grades(answer.text, sample)) if isinstance(task, Graded) else {},
            meta=dict(sample.meta),
        )
