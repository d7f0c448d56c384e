"""Run the demo: samples through all arms, then the table, the showcase and the figures."""

from __future__ import annotations

import os
import platform
import time
from typing import TYPE_CHECKING, Final

import torch
from tqdm import tqdm

from icecache.demo.arms import ARMS, Bench, Measurement
from icecache.demo.options import DemoOptions
from icecache.demo.showcase import showcase
from icecache.demo.table import render, table_rows, to_json
from icecache.eval.needle import TASKS, Sample, load_needle, make_samples

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Whose first sample is written out and drawn: answers short enough to read, needles far apart.
SHOWCASE_TASKS: Final = ("vt3", "kv32", "passkey", "gsm", "chase8")
WARM_UP_LENGTH: Final = 512


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def draw_samples(options: DemoOptions) -> list[Sample]:
    """All samples, task by task."""
    return [
        sample
        for task in options.tasks
        for sample in make_samples(task, options.length, options.samples, options.seed, rows_per_seed=1)
    ]


def showcase_sample(samples: list[Sample]) -> Sample:
    """Pick the first sample of the task that reads best."""
    rank = {task: place for place, task in enumerate(SHOWCASE_TASKS)}
    return min(samples, key=lambda sample: rank.get(sample.task, len(rank)))


def verdicts(measured: list[Measurement]) -> str:
    """One line about a sample: which arms were right."""
    marks = (f"{m.arm.label} {'ok' if m.outcome.exact_match else 'wrong'}" for m in measured)
    return f"prefill {measured[0].prefill_seconds:.1f} s; " + ", ".join(marks)


def warm_up(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Run a short sample through every arm, so that the first measured one does not pay for lazy set-up."""
    for _ in Bench(model, tokenizer, 1).measure(make_samples("passkey", WARM_UP_LENGTH, 1)[0]):
        pass


def measure_all(bench: Bench, samples: list[Sample], shown: Sample) -> list[Measurement]:
    """Measure with a progress bar (on a terminal) and a line a sample."""
    measurements: list[Measurement] = []
    # disable=None: no bar where there is no terminal.
    with tqdm(total=len(samples) * (len(ARMS) + 2), unit="run", disable=None, leave=False) as bar:
        for number, sample in enumerate(samples, 1):
            name = f"{sample.task} ({number}/{len(samples)})"
            bar.set_description(f"{name} prefill")
            measured: list[Measurement] = []
            for done in bench.measure(sample, traced=sample is shown):
                if isinstance(done, Measurement):
                    measured.append(done)
                bar.set_description(f"{name} {ARMS[min(len(measured), len(ARMS) - 1)].label}")
                bar.update()
            bar.write(f"{name}: {verdicts(measured)}")
            measurements += measured
    return measurements


def run_demo(options: DemoOptions) -> list[Measurement]:
    """Run the demo and write `table.txt`, `results.json` and two figures to `options.out`.

    Parameters
    ----------
    options : DemoOptions
        What to show.

    Returns
    -------
    list of Measurement
        Every arm on every sample.
    """
    began = time.perf_counter()
    cores = options.threads or available_cores()
    options.out.mkdir(parents=True, exist_ok=True)
    model, tokenizer = load_needle()
    print(
        f"needle-3m (3.08M parameters, float32), {options.samples} sample(s) of {options.length} tokens a task.\n"
        f"The context is prefilled densely once; prefill and index use {cores} thread(s), the steps one.\n"
        "Question and answer attend each arm's way. Scores are exact matches of the whole answer.",
        flush=True,
    )
    for task in options.tasks:
        print(f"  {task}: {TASKS[task].summary}", flush=True)
    warm_up(model, tokenizer)
    samples = draw_samples(options)
    shown = showcase_sample(samples)
    bench = Bench(model, tokenizer, cores)
    measurements = measure_all(bench, samples, shown)
    report(options, measurements, shown, bench)
    print(f"done in {time.perf_counter() - began:.0f} s")
    return measurements


def report(options: DemoOptions, measurements: list[Measurement], shown: Sample, bench: Bench) -> None:
    """Print and write everything."""
    from icecache.demo.pages import draw_pages
    from icecache.demo.plots import draw_accuracy

    text = render(table_rows(measurements, options.tasks))
    story = showcase(shown, measurements)
    print(f"\n{text}\n\n{story}\n")
    facts: dict[str, object] = {
        "length": options.length,
        "samples": options.samples,
        "tasks": list(options.tasks),
        "seed": options.seed,
        "threads": bench.threads,
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }
    paths = [options.out / name for name in ("table.txt", "results.json", "accuracy.png", "pages.png")]
    paths[0].write_text(f"{text}\n\n{story}\n")
    paths[1].write_text(to_json(measurements, facts))
    draw_accuracy(measurements, options.tasks, paths[2])
    draw_pages(bench.trace, shown, paths[3])
    for path in paths:
        print(path)
