"""Exact match of needle-3m under a budget, with the oracles that say what is at fault where a budget misses.

    python benches/python/bench_needle.py --length 16384 --samples 64 --rows 16 --device cuda --out needle-16k.json

All arms answer the same prompts from one dense prefill a batch (setup B: question and answer attend the arm's way).
`page-oracle` reads the pages that exact scores choose (its gap to icecache is the search's fault), `token-oracle` reads
the exact top tokens (its gap to the page oracle is the packing's fault); what is left is the budget's.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import transformers
from icecache import IceRuntime
from icecache.eval.needle import load_needle, make_samples
from icecache.eval.needle.runner import Arm, full_attention, run_samples
from transformers import Cache, PreTrainedModel

TASKS = ["passkey", "kv32", "kv_dense", "kv_rand", "vt3", "gsm", "chase8"]


def sparse_arm(model: PreTrainedModel, policy: str, budget: int, stats: list[dict[str, float]]) -> Arm:
    """Arm that attends under `policy` and `budget`; appends what it attended to `stats`."""

    @contextmanager
    def arm(prefilled: Cache) -> Iterator[Cache]:
        with IceRuntime.wrap(model, policy=policy, budget=budget) as runtime:
            yield runtime.adopt(prefilled)
            seen = runtime.stats()
            stats.append({"attended": seen.attended_mean, "attended_max": seen.attended_max, "mass": seen.mass_kept})

    return arm


def run_task(model: PreTrainedModel, task: str, args: argparse.Namespace) -> list[dict[str, object]]:
    """One row per arm of a task."""
    samples = make_samples(task, args.length, args.samples, seed=args.seed, rows_per_seed=args.rows)
    stats: dict[str, list[dict[str, float]]] = {}
    arms: dict[str, Arm] = {"full": full_attention}
    for name in args.arms:
        policy, _, budget = name.partition("@")
        stats[name] = []
        arms[name] = sparse_arm(model, policy, int(budget), stats[name])
    began = time.perf_counter()
    outcomes = run_samples(model, samples, arms, setup=args.setup, rows=args.rows)
    seconds = time.perf_counter() - began
    rows: list[dict[str, object]] = []
    for name, results in outcomes.items():
        right = [r.exact_match for r in results]
        mean = {
            k: sum(s[k] for s in stats.get(name, [])) / max(1, len(stats.get(name, []))) for k in ("attended", "mass")
        }
        rows.append({"task": task, "arm": name, "exact_match": sum(right) / len(right), "right": right, **mean,
                     "ms_per_step": 1e3 * sum(r.seconds_per_token for r in results) / len(results)})  # fmt: skip
    print(f"{task}: {seconds:.0f} s", flush=True)
    return rows


def print_table(rows: list[dict[str, object]]) -> None:
    """Exact match of every arm by task, and its ratio to full attention over the five tasks of the claim."""
    tasks = list(dict.fromkeys(str(r["task"]) for r in rows))
    score = {(r["arm"], r["task"]): float(str(r["exact_match"])) for r in rows}
    attended = {r["arm"]: float(str(r["attended"])) for r in rows}
    print(f"{'arm':18}" + "".join(f"{t:>10}" for t in tasks) + f"{'attended':>10}")
    for arm in dict.fromkeys(str(r["arm"]) for r in rows):
        cells = "".join(f"{score[arm, t]:10.3f}" if (arm, t) in score else f"{'-':>10}" for t in tasks)
        print(f"{arm:18}{cells}{attended[arm]:10.1f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--rows", type=int, default=4, help="samples of a batch")
    parser.add_argument("--tasks", nargs="+", default=TASKS)
    parser.add_argument(
        "--arms",
        nargs="+",
        default=[f"{p}@{b}" for b in (64, 128, 256) for p in ("icecache", "page-oracle", "token-oracle", "streaming")],
    )
    parser.add_argument("--setup", choices=["A", "B"], default="B")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True, help="JSON lines; finished tasks in it are not run again")
    args = parser.parse_args()
    model, _ = load_needle(args.device, getattr(torch, args.dtype))
    done = [json.loads(line) for line in args.out.read_text(encoding="utf-8").splitlines()] if args.out.exists() else []
    rows = [r for r in done if "task" in r]
    for task in args.tasks:
        if any(r["task"] == task for r in rows):
            continue
        new = run_task(model, task, args)
        rows += new
        with args.out.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(r) + "\n" for r in new)
        print_table(rows)
    sha = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    device = (
        torch.cuda.get_device_name() if args.device.startswith("cuda") else platform.processor() or platform.machine()
    )
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    settings = {name: str(value) for name, value in vars(args).items()}
    print(json.dumps({"bench": "needle", "git": sha, "device": device, **versions, **settings}))


if __name__ == "__main__":
    main()
