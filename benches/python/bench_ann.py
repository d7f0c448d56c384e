"""`icecache.Index` beside other nearest-neighbour libraries: build, insert, delete, memory, recall against queries/s.

    python -m venv .venv-ann && .venv-ann/bin/pip install -r benches/requirements-ann.txt
    export PYTHONPATH=python                    # the checkout's package, built by `make build`
    .venv/bin/python benches/python/bench_ann.py prepare --cache ~/.cache/icecache-ann     # needs torch, transformers
    .venv-ann/bin/python benches/python/bench_ann.py run    --cache ... --out ...          # hours; resumes
    .venv-ann/bin/python benches/python/bench_ann.py pairs  --cache ... --out ...          # top contenders, interleaved
    .venv-ann/bin/python benches/python/bench_ann.py stream --cache ... --out ...          # sliding window, clustered
    .venv/bin/python benches/python/bench_ann.py report --out ... --save benches/results/ann

`run --quick` uses two small data sets and takes a minute. A library that is not installed is skipped with a note.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from ann import datasets, pairs, report, runner, streaming
from ann.options import Options
from ann.peers import PEERS

DATA = ("keys36k", "minilm32k", "gmm200k", "keys300k")
QUICK = ("keys4k", "gmm4k")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("prepare", "run", "pairs", "stream", "report"):
        command = commands.add_parser(name)
        if name != "report":
            command.add_argument("--cache", type=Path, required=True, help="folder of the data sets")
            command.add_argument("--data", nargs="*", choices=[*datasets.RECIPES], help=f"default {' '.join(DATA)}")
        if name != "prepare":
            command.add_argument("--out", type=Path, required=True, help="folder of the measurements")
        if name in ("run", "pairs", "stream"):
            command.add_argument("--peers", nargs="*", choices=[*PEERS], help="default: all")
            command.add_argument("--quick", action="store_true", help="small data, one repeat")
            command.add_argument("--cpu-s", type=float, default=240.0, help="CPU seconds a cell may use (default 240)")
            command.add_argument("--wall-s", type=int, default=1800, help="seconds until a cell is killed")
            command.add_argument("--rounds", type=int, default=9, help="rounds of the pairs (default 9)")
        if name == "report":
            command.add_argument("--save", type=Path, help="write PATH.txt, PATH.json and PATH.svg")
    return parser.parse_args()


def options(args: argparse.Namespace) -> Options:
    repeats = 1 if args.quick else 3
    return Options(cache=args.cache, out=args.out, cpu_s=args.cpu_s, wall_s=args.wall_s, repeats=repeats)


def prepare(args: argparse.Namespace) -> None:
    for name in args.data or DATA:
        data = datasets.load(name, args.cache)
        print(
            f"{name}: {len(data.base)} x {data.base.shape[1]} {data.metric} {data.digest}\n  {data.about}", flush=True
        )


def chosen(args: argparse.Namespace) -> list[tuple[str, str]]:
    data = args.data or (QUICK if args.quick else DATA)
    metrics = {name: datasets.load(name, args.cache).metric for name in data}
    return runner.plan(list(data), args.peers or [*PEERS], metrics)


def say(line: str) -> None:
    print(line, flush=True)


def main() -> None:
    args = parse()
    commands: dict[str, Callable[[], None]] = {
        "prepare": lambda: prepare(args),
        "run": lambda: runner.run_all(chosen(args), options(args), say),
        "pairs": lambda: pairs.run_all(chosen(args), options(args), args.rounds, say),
        "stream": lambda: streaming.run_all(chosen(args), options(args), say),
        "report": lambda: say(report.write(args.out, args.save)),
    }
    commands[args.command]()


if __name__ == "__main__":
    main()
