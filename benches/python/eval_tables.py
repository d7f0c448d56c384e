"""Make the tables of benches/results/eval-*: runs of `icecache eval run` side by side on one GPU, until time is over.

    python benches/python/eval_tables.py run --out OUT --part main --seconds 500 --workers 8
    python benches/python/eval_tables.py merge --out OUT --into RESULTS

`--part main`: every policy at 16k in setup B, budgets 64 and 256. `--part side`: 4k and 32k, setup A and budget 128 for
the policies of the paper's tables. Each job is one process with one folder and resumes: several runs finish a part.
"""

from __future__ import annotations

import argparse
import gzip
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import Queue

from icecache.arguments import task_list
from icecache.eval.folder import MANIFEST, SAMPLES, merge_folders
from icecache.eval.report import write_report

MODELS = {
    "needle-3m": "needle-3m",
    "needle-qwen3": "benches/models/needle-qwen3",
    "needle-mha": "benches/models/needle-mha",
}
TASKS = ("kv_dense", "kv_rand", "chase8", "gsm", "vt3", "kv32", "passkey")
BASELINES = ("arkvale", "snapkv", "icecache-reuse", "h2o", "omnikv", "magicpig")
ORACLES = ("token-oracle", "token-oracle-q", "page-oracle", "oracle-sampling")
CONTROLS = ("full", "exact", "random", "streaming", "no-context")
FEW = ("icecache", "icecache-paper", "quest", "pqcache")


@dataclass(frozen=True, slots=True)
class Job:
    """One start of `icecache eval run`."""

    name: str
    model: str
    arguments: tuple[str, ...]

    @property
    def command(self) -> list[str]:
        """The command, but for its folder."""
        return [
            *(sys.executable, "-m", "icecache", "eval", "run", "--model", MODELS[self.model]),
            *("--set", "decode=eager", "--resume", *self.arguments),
        ]


def _job(name: str, model: str, limit: int, **lists: Sequence[str]) -> Job:
    """Make a job of the lists that it hands on."""
    values = (f"--{key}={','.join(value)}" for key, value in lists.items())
    return Job(f"{model}.{name}", model, (f"--limit={limit}", f"--batch={limit}", *values))


def main_jobs(args: argparse.Namespace) -> Iterator[Job]:
    """List every policy at 16k: ours and the paper's first, oracles last."""
    for model in args.models:
        for task in args.tasks:
            eager = ("full-eager",) if task in {"kv32", "kv_dense"} else ()
            lists = {
                "tasks": (task,),
                "policies": args.policies or (*FEW, *BASELINES, *ORACLES),
                "controls": args.controls or (*CONTROLS, *eager),
            }
            name = f"16k-B.{task}{args.suffix}"
            yield _job(name, model, args.limit, lengths=("16k",), setup=("B",), budgets=("64", "256"), **lists)


def side_jobs(args: argparse.Namespace) -> Iterator[Job]:
    """List the other lengths, the other setup and the budget between, for the policies of the paper's tables."""
    lists = {"policies": args.policies or FEW, "controls": args.controls or ("full", "random", "streaming")}
    for model in args.models:
        for length, setup, budgets in (
            ("4k", "A,B", "64,128,256"),
            ("16k", "B", "128"),
            ("16k", "A", "64,128,256"),
            ("32k", "A,B", "64,128,256"),
        ):
            for tasks in (TASKS[:2], TASKS[2:4], TASKS[4:]):
                name = f"{length}-{setup.replace(',', '')}-{budgets.count(',')}.{tasks[0]}{args.suffix}"
                cell = {"tasks": tasks, "lengths": (length,), "setup": setup.split(","), "budgets": budgets.split(",")}
                yield _job(name, model, args.limit, **cell, **lists)


def _run(job: Job, args: argparse.Namespace, end: float, free: Queue[set[int]]) -> str:
    cores = free.get()
    try:
        return _run_on(job, args, end, cores)
    finally:
        free.put(cores)


def _run_on(job: Job, args: argparse.Namespace, end: float, cores: set[int]) -> str:
    left = end - time.monotonic()
    if left < 15:  # what a start costs
        return f"{job.name}: no time"
    began = time.monotonic()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with (args.out / f"{job.name}.log").open("a") as log:
        try:
            done = subprocess.run(
                [*job.command, "--out", str(args.out / job.name), "--device", args.device],
                stdout=log,
                stderr=subprocess.STDOUT,
                timeout=left,
                check=False,
                env=environment,
                preexec_fn=lambda: os.sched_setaffinity(0, cores),
            )
        except subprocess.TimeoutExpired:
            return f"{job.name}: cut"
    how = "done" if done.returncode == 0 else f"FAILED {done.returncode}"
    return f"{job.name}: {how} {time.monotonic() - began:.0f} s"


def run(args: argparse.Namespace) -> None:
    """Run the jobs of a part until the time is over."""
    args.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + args.seconds
    jobs = [job for job in {"main": main_jobs, "side": side_jobs}[args.part](args) if args.match in job.name]
    every, free = sorted(os.sched_getaffinity(0)), Queue[set[int]]()
    for i in range(args.workers):  # or every process would start as many threads as there are cores
        free.put(set(every[i :: args.workers]) or set(every))
    with ThreadPoolExecutor(args.workers) as pool:
        for line in pool.map(lambda job: _run(job, args, end, free), jobs):
            print(line, flush=True)


def merge(args: argparse.Namespace) -> None:
    """Put the folders of each model into one of `--into`, records compressed."""
    for model in MODELS:
        folders = sorted(p.parent for p in args.out.glob(f"{model}.*/{SAMPLES}") if p.stat().st_size)
        if not folders:
            continue
        whole = args.out / f"all-{model}"
        shutil.rmtree(whole, ignore_errors=True)
        n = merge_folders(folders, whole)
        write_report(whole, formats=("md", "html"))
        target = args.into / f"eval-{model}-h100"
        target.mkdir(parents=True, exist_ok=True)
        with (whole / SAMPLES).open("rb") as plain, gzip.open(target / f"{SAMPLES}.gz", "wb", 9) as packed:
            shutil.copyfileobj(plain, packed)
        for name in (MANIFEST, "report.md"):
            shutil.copy(whole / name, target / name)
        print(f"{model}: {n} records of {len(folders)} runs in {target}")


def main() -> None:
    """Parse the arguments and go."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("run", "merge"):
        sub = verbs.add_parser(verb)
        sub.add_argument("--out", type=Path, required=True, help="of the runs, one folder a job")
        if verb == "merge":
            sub.add_argument("--into", type=Path, default=Path("benches/results"))
            continue
        sub.add_argument("--part", choices=("main", "side"), required=True)
        sub.add_argument("--seconds", type=float, required=True, help="begin and let live no job beyond")
        sub.add_argument("--workers", type=int, default=8, help="processes at once")
        sub.add_argument("--limit", type=int, default=80, help="samples a task")
        sub.add_argument("--device", default="cuda")
        sub.add_argument("--models", type=task_list, default=tuple(MODELS), help="of " + ", ".join(MODELS))
        sub.add_argument("--tasks", type=task_list, default=TASKS, help="of --part main")
        sub.add_argument("--policies", type=task_list, help="instead of the part's own")
        sub.add_argument("--controls", type=task_list, help="instead of the part's own")
        sub.add_argument("--suffix", default="", help="of the folders, for a second set of policies")
        sub.add_argument("--match", default="", help="only jobs with this in their name")
    args = parser.parse_args()
    {"run": run, "merge": merge}[args.verb](args)


if __name__ == "__main__":
    main()
