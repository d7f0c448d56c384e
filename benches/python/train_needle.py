"""Train needle-3m, the model that ships, from synthetic data within a wall-clock limit.

    python benches/python/train_needle.py --minutes 7.2 --out out-needle          # one GPU; the shipped model's recipe
    python benches/python/train_needle.py --preset cpu --minutes 1 --out out-smoke    # smoke test

Prints the loss, an exact-match table, and the largest difference of logits to transformers. As stages end by wall
clock, runs differ from machine to machine and time to time.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import torch
from needle.checkpoint import load, parity, save
from needle.config import ModelShape, Plan, cpu_preset, gpu_preset
from needle.evaluate import evaluate
from needle.train import train


def parse() -> argparse.Namespace:
    """Read the command line; shape and plan options default to the preset's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=["gpu", "cpu"], default="gpu")
    parser.add_argument("--minutes", type=float, default=7.2, help="wall clock of the training (default 7.2)")
    parser.add_argument("--out", type=Path, default=Path("out-needle"), help="folder of the checkpoint")
    parser.add_argument("--eval-only", action="store_true", help="evaluate the checkpoint in --out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--arch", choices=["llama", "qwen3"], default="llama")
    for option in ("layers", "hidden", "intermediate", "query-heads", "kv-heads", "head-dim", "max-positions"):
        parser.add_argument(f"--{option}", type=int)
    parser.add_argument("--rope-theta", type=float)
    parser.add_argument("--tokens-per-step", type=int)
    parser.add_argument("--muon-lr", type=float)
    parser.add_argument("--adam-lr", type=float)
    parser.add_argument("--stages", help="LENGTH:SHARE,LENGTH:SHARE,...")
    parser.add_argument("--eval-lengths", help="LENGTH,LENGTH,...")
    return parser.parse_args()


def configure(args: argparse.Namespace) -> tuple[ModelShape, Plan]:
    """Apply the command line to the preset."""
    shape, plan = (cpu_preset if args.preset == "cpu" else gpu_preset)(args.minutes)
    given = {name: value for name, value in vars(args).items() if value is not None}
    shape = replace(shape, **{name: given[name] for name in ModelShape.__dataclass_fields__ if name in given})
    if args.stages:
        pairs = (stage.split(":") for stage in args.stages.split(","))
        given["stages"] = tuple((int(length), float(share)) for length, share in pairs)
    if args.eval_lengths:
        given["eval_lengths"] = tuple(int(length) for length in args.eval_lengths.split(","))
    return shape, replace(plan, **{name: given[name] for name in Plan.__dataclass_fields__ if name in given})


def main() -> None:
    """Train (unless told otherwise), evaluate, compare with transformers."""
    args = parse()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape, plan = configure(args)
    if not args.eval_only:
        model, facts = train(shape, plan, device)
        save(model, args.out, facts)
        print(json.dumps({"device": str(device), **facts}))
    table = evaluate(load(args.out, device), plan.eval_lengths)
    (args.out / "eval_full_kv.json").write_text(json.dumps(table, indent=1) + "\n")
    print(f"largest difference of logits to transformers: {parity(args.out, device):.2e}")


if __name__ == "__main__":
    main()
