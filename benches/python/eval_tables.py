"""Make the tables of benches/results/eval-*: runs of `icecache eval run` side by side on one GPU, until time is over.

    python benches/python/eval_tables.py run --out OUT --part main --seconds 500
    python benches/python/eval_tables.py run --out OUT --seconds 300 16k/ours/needle-3m 32k/few/needle-mha/gsm+vt3
    python benches/python/eval_tables.py merge --out OUT --into RESULTS --machine h200

A job is `CELL/GROUP/MODEL`, or `CELL/GROUP/MODEL/TASK+TASK` for some of its tasks: one process, one folder that
resumes, so several runs finish a part. Jobs start in the order given, as many at once as `--workers` and the memory
allow. `JOB:KEY=VALUE` is a job with a field of `IceConfig`; `merge` puts the last word of the key into the names of its
policies (`16k/ice/needle-mha:estimate_unread=true` gives `icecache-unread@64`). `--part main`: every policy at 16k in
setup B with budgets 64 and 256. `--part side`: 4k, 32k, setup A and the budget between, for the policies of the paper's
tables.
"""

from __future__ import annotations

import argparse
import gzip
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from icecache.arguments import task_list, token_count
from icecache.eval.folder import MANIFEST, SAMPLES, RunFolder, merge_folders, read_manifest, read_records
from icecache.eval.pool import pool
from icecache.eval.record import Record
from icecache.eval.report import write_report

MODELS = {
    "needle-3m": "needle-3m",
    "needle-qwen3": "benches/models/needle-qwen3",
    "needle-mha": "benches/models/needle-mha",
}
# Four KV heads where the others have one: as many bytes and trees a row.
WIDE = frozenset({"needle-mha"})
SHORT, LONG = ("kv_dense", "kv_rand", "vt3", "kv32", "passkey"), ("gsm", "chase8")
SIDE_TASKS = ("kv_dense", "kv_rand", "vt3", "gsm")


@dataclass(frozen=True, slots=True)
class Cell:
    """Lengths, setups and budgets of a part of the tables."""

    length: str
    setup: str
    budgets: str
    rows: int
    """Samples a task; half as many of a wide model."""


MAIN = "16k"
CELLS = {
    MAIN: Cell("16k", "B", "64,256", 80),
    "16k-all": Cell("16k", "B", "64,128,256", 80),
    "16k-128": Cell("16k", "B", "128", 80),
    "16k-A": Cell("16k", "A", "64,256", 24),
    "32k": Cell("32k", "B", "64,256", 16),
    "4k": Cell("4k", "B", "64,256", 24),
    "32k-A": Cell("32k", "A", "64,256", 16),
    "4k-A": Cell("4k", "A", "64,256", 24),
}
# All tasks.
WHOLE = (MAIN, "16k-all", "16k-128")
# Names of policies, or of controls. One group is one prefill; ours runs as CUDA graphs, pages and paper on the host.
GROUPS = {
    "ours": ("icecache", "icecache-reuse"),
    "ice": ("icecache",),
    "rivals": (
        *("full", "streaming", "no-context", "quest", "pqcache", "arkvale", "snapkv", "h2o", "omnikv", "magicpig"),
        *("token-oracle", "token-oracle-q", "oracle-sampling"),
    ),
    "few": ("full", "streaming", "quest", "pqcache", "random", "icecache-paper"),
    "pages": ("random", "page-oracle"),
    "random": ("random",),
    "paper": ("icecache-paper",),
    "noise": ("full", "exact", "full-eager"),
}
NOISE_TASKS = ("kv32",)


@dataclass(frozen=True, slots=True)
class Job:
    """One start of `icecache eval run`."""

    cell: str
    group: str
    model: str
    tasks: tuple[str, ...]
    setting: str = ""

    @classmethod
    def parse(cls, text: str) -> Job:
        """Read CELL/GROUP/MODEL/TASK+TASK:KEY=VALUE.

        Raises
        ------
        SystemExit
            If a name is unknown.
        """
        names, _, setting = text.partition(":")
        cell, group, model, tasks = (*names.split("/"), "", "", "")[:4]
        for what, name, known in (("cell", cell, CELLS), ("group", group, GROUPS), ("model", model, MODELS)):
            if name not in known:
                msg = f"job {text!r}: {what} must be one of {', '.join(known)}, got {name!r}"
                raise SystemExit(msg)
        usual = NOISE_TASKS if group == "noise" else (*SHORT, *LONG) if cell in WHOLE else SIDE_TASKS
        return cls(cell, group, model, tuple(tasks.split("+")) if tasks else usual, setting)

    @property
    def name(self) -> str:
        """Of its folder."""
        word = self.setting.partition("=")[0].rpartition("_")[2]
        return ".".join((self.model, self.cell, self.group, self.tasks[0], *([word] if word else [])))

    @property
    def rows(self) -> int:
        """Samples of a batch, and of a task."""
        return CELLS[self.cell].rows // (2 if self.model in WIDE else 1)

    @property
    def gib(self) -> float:
        """Device memory at most, roughly: activations of a prefill, the cache, an arm's copy, a layer in float32."""
        cache = 2048 * (4 if self.model in WIDE else 1)  # bytes a token: 4 layers, bfloat16
        return self.rows * token_count(CELLS[self.cell].length) * (4 * cache + 10_000) / 2**30 + 2

    def command(self, rows: int) -> list[str]:
        """Say what to start, but for its folder."""
        cell, arms = CELLS[self.cell], GROUPS[self.group]
        return [
            *(sys.executable, "-m", "icecache", "eval", "run", "--model", MODELS[self.model], "--resume"),
            *(f"--limit={self.rows}", f"--batch={rows}", f"--lengths={cell.length}", f"--setup={cell.setup}"),
            *(f"--budgets={cell.budgets}", f"--tasks={','.join(self.tasks)}", "--controls=none"),
            f"--policies={','.join(arms)}",
            *([f"--set={self.setting}"] if self.setting else []),
        ]


def jobs_of(part: str, models: Sequence[str]) -> Iterator[Job]:
    """List the jobs of a part, work of the device and of the host in turn."""
    if part == "side":
        texts = [f"{cell}/{group}" for cell in CELLS if cell not in WHOLE[:2] for group in ("few", "ice")]
        yield from (Job.parse(f"{text}/{model}") for text in texts for model in models)
        return
    for group in ("ours", "rivals", "paper", "pages"):
        for model in models:
            yield from (Job(MAIN, group, model, tasks) for tasks in (SHORT, LONG))
    yield from (Job.parse(f"{MAIN}/noise/{model}") for model in models)


class Memory:
    """What the jobs at work may take of the device together.

    Parameters
    ----------
    gib : float
        Of all of them; a job that wants more runs alone.
    """

    def __init__(self, gib: float) -> None:
        self._gib, self._taken, self._changed = gib, 0.0, threading.Condition()

    @contextmanager
    def lent(self, gib: float) -> Iterator[None]:
        """Wait for room."""
        gib = min(gib, self._gib)
        with self._changed:
            self._changed.wait_for(lambda: self._taken + gib <= self._gib)
            self._taken += gib
        try:
            yield
        finally:
            with self._changed:
                self._taken -= gib
                self._changed.notify_all()


def free_gib(device: str) -> float:
    """Memory of a CUDA device that the jobs may take together; of a CPU, some."""
    if not device.startswith("cuda"):
        return 8.0
    import torch

    return 0.85 * torch.cuda.mem_get_info(device)[0] / 2**30


def _run(job: Job, args: argparse.Namespace, end: float, memory: Memory) -> str:
    with memory.lent(job.gib):
        began = time.monotonic()
        how = ""
        for rows in (job.rows, max(1, job.rows // 4)):  # smaller batches where the device's memory was too small
            left = end - time.monotonic()
            if left < 15:  # what a start costs
                return f"{job.name}: no time{how}"
            how = _start(job, args, rows, left)
            if not how.startswith("FAILED"):
                break
    return f"{job.name}: {how} {time.monotonic() - began:.0f} s"


def _start(job: Job, args: argparse.Namespace, rows: int, seconds: float) -> str:
    # The index of every process gets its share of the cores and a little more: they do not all pack at once.
    threads = max(1, round(1.25 * len(os.sched_getaffinity(0)) / args.workers))
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "ICECACHE_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    }
    command = [*job.command(rows), "--out", str(args.out / job.name), "--device", args.device]
    with (args.out / f"{job.name}.log").open("a") as log:
        try:
            done = subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, timeout=seconds, check=False, env=environment
            )
        except subprocess.TimeoutExpired:
            return "cut"
    return "done" if done.returncode == 0 else f"FAILED {done.returncode}"


def run(args: argparse.Namespace) -> None:
    """Run jobs until the time is over."""
    args.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + args.seconds
    jobs = [Job.parse(text) for text in args.jobs] or [*jobs_of(args.part, args.models)]
    memory = Memory(free_gib(args.device))
    with ThreadPoolExecutor(args.workers) as pool:
        for line in pool.map(lambda job: _run(job, args, end, memory), jobs):
            print(line, flush=True)


def stripped(folder: Path, into: Path, taken: Callable[[Record], Record | None]) -> Path:
    """Copy the records that `taken` gives without their settings: those do not matter, or the arms name them."""
    manifest = read_manifest(folder)
    manifest = replace(manifest, identity={**manifest.identity, "settings": []})
    shutil.rmtree(into, ignore_errors=True)
    with RunFolder(into, manifest, resume=False) as run:
        run.add(record for one in read_records(folder) if (record := taken(one)) is not None)
    return into


def borrowed(record: Record) -> Record | None:
    """Take what stands beside new records.

    Not those of our arms, which other settings may have decoded, nor of the controls that must give the tokens of full
    attention on the very same machine.
    """
    return None if record.arm.partition("@")[0] in {*GROUPS["ours"], "exact", "full-eager"} else record


def named(record: Record, suffix: str) -> Record:
    """Put the suffix of a folder into the name of the policy: "icecache@64" with "unread" is "icecache-unread@64"."""
    policy, at, budget = record.arm.partition("@")
    return replace(record, arm=f"{policy}-{suffix}{at}{budget}")


def merge(args: argparse.Namespace) -> None:
    """Put the folders of each model into one of `--into`, records compressed, and write the table of all models.

    Where a folder lacks records, those of `--earlier` ones fill in.
    """
    for model in MODELS:
        folders = sorted(p.parent for p in args.out.glob(f"{model}.*/{SAMPLES}") if p.stat().st_size)
        if not folders:
            continue
        kept = [folder for folder in args.earlier if str(read_manifest(folder).identity["model"]) == model]
        for i, folder in enumerate(folders):
            if suffix := folder.name.split(".")[4:]:  # behind model, cell, group, task
                folders[i] = stripped(folder, args.out / f"named-{folder.name}", partial(named, suffix=suffix[0]))
        folders += [stripped(folder, args.out / f"earlier-{i}-{model}", borrowed) for i, folder in enumerate(kept)]
        whole = args.out / f"all-{model}"
        shutil.rmtree(whole, ignore_errors=True)
        n = merge_folders(folders, whole)
        write_report(whole, formats=("md", "html"))
        target = args.into / f"eval-{model}-{args.machine}"
        target.mkdir(parents=True, exist_ok=True)
        with (whole / SAMPLES).open("rb") as plain, gzip.open(target / f"{SAMPLES}.gz", "wb", 9) as packed:
            shutil.copyfileobj(plain, packed)
        for name in (MANIFEST, "report.md"):
            shutil.copy(whole / name, target / name)
        print(f"{model}: {n} records of {len(folders)} runs in {target}")
    folders = sorted(args.into.glob(f"eval-*-{args.machine}"))
    if folders:
        (args.into / f"eval-needle-{args.machine}.md").write_text(pool(folders), encoding="utf-8")


def main() -> None:
    """Parse the arguments and go."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb in ("run", "merge"):
        sub = verbs.add_parser(verb)
        sub.add_argument("--out", type=Path, required=True, help="of the runs, one folder a job")
        if verb == "merge":
            sub.add_argument("--into", type=Path, default=Path("benches/results"))
            sub.add_argument(
                "--earlier", type=Path, nargs="*", default=(), metavar="DIR", help="results to fill in from"
            )
            sub.add_argument("--machine", default="h200", help="last part of the folders' names")
            continue
        sub.add_argument(
            "jobs", nargs="*", metavar="CELL/GROUP/MODEL[/TASK+TASK][:KEY=VALUE]", help="instead of a part"
        )
        sub.add_argument("--part", choices=("main", "side"), default="main")
        sub.add_argument("--seconds", type=float, required=True, help="begin and let live no job beyond")
        sub.add_argument("--workers", type=int, default=4, help="processes at once")
        sub.add_argument("--device", default="cuda")
        sub.add_argument(
            "--set", dest="settings", action="append", default=[], metavar="KEY=VALUE", help="of IceConfig"
        )
        sub.add_argument("--suffix", default="", help="of the folders: records with other settings need others")
        sub.add_argument("--models", type=task_list, default=tuple(MODELS), help="of " + ", ".join(MODELS))
    args = parser.parse_args()
    {"run": run, "merge": merge}[args.verb](args)


if __name__ == "__main__":
    main()
