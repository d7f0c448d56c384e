"""The `icecache` command. Subcommands are imported when they run, so that `--help` is instant."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from icecache.arguments import count_list, task_list, token_count
from icecache.eval.commands import add_eval_parser, run_command

# 128 + SIGINT, as shells report it.
INTERRUPTED = 130


def build_parser() -> argparse.ArgumentParser:
    """Build the parser of all subcommands."""
    parser = argparse.ArgumentParser(prog="icecache", description=__doc__.partition(".")[0] + ".", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="a real model answers from 16k tokens, with full attention and under small budgets",
        description="Full KV cache, IceCache and StreamingLLM at 64, 128 and 256 tokens per KV head, side by side. "
        "Runs offline with the model that ships; about 5 minutes on 2 cores, --quick under 1.",
        allow_abbrev=False,
    )
    demo.add_argument("--length", type=token_count, metavar="TOKENS", help="of a sample (default 16k; quick: 4k)")
    demo.add_argument("--tasks", type=task_list, metavar="A,B,...", help="default kv32,vt3,gsm,chase8")
    demo.add_argument("--samples", type=int, metavar="N", help="a task (default 2; quick: 1)")
    demo.add_argument("--quick", action="store_true", help="shorter contexts, one sample a task")
    demo.add_argument("--out", type=Path, metavar="DIR", help="for table and figures (default ./demo-out)")
    demo.add_argument("--seed", type=int, help="of the samples (default 0)")
    demo.add_argument("--threads", type=int, metavar="N", help="default: the cores this process may use")
    bench = commands.add_parser(
        "bench",
        help="time per token by context, budget, batch and method",
        description="Decode with random weights of a well-known shape and compare with full attention. Every cell is "
        "saved as it ends; the same command goes on where an earlier one stopped.",
        allow_abbrev=False,
    )
    bench.add_argument("--shape", metavar="NAME", help="llama-3.1-8b (default), mistral-7b, longchat-7b, qwen3-4b, ...")
    bench.add_argument(
        "--contexts", type=count_list, metavar="N,N,...", help="tokens in the cache (default 4k,36k,...)"
    )
    bench.add_argument("--budgets", type=count_list, metavar="N,N,...", help="tokens attended (default 256)")
    bench.add_argument("--batches", type=count_list, metavar="N,N,...", help="sequences decoded together (default 1)")
    bench.add_argument("--methods", type=task_list, metavar="A,B,...", help="default ice,hf,flash-graph")
    bench.add_argument(
        "--only",
        type=task_list,
        metavar="M@N,...",
        help="single cells: ice@36k, ice@64kx4 (batch 4), ice@128k:1024 (budget)",
    )
    bench.add_argument("--parts", action="store_true", default=None, help="profile: time on the device by part")
    bench.add_argument("--stop-after-s", type=float, metavar="S", help="begin no cell later; the next run goes on")
    bench.add_argument("--steps", type=int, metavar="N", help="tokens timed a cell (default 64)")
    bench.add_argument("--prompt", action="store_true", default=None, help="compute prompts: time to the first token")
    bench.add_argument("--device", help="cuda (default) or cpu")
    bench.add_argument("--seed", type=int, help="of weights and caches (default 0)")
    bench.add_argument("--out", type=Path, metavar="DIR", help="for cells, table and figure (default ./bench-out)")
    add_eval_parser(commands)
    commands.add_parser("doctor", help="explain this machine: what IceCache finds and what it would use")
    return parser


def demo(args: argparse.Namespace) -> int:
    """Run `icecache demo`."""
    # Before torch loads OpenMP: threads that wait by spinning cost a multiple when other processes want the cores.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from icecache.demo.options import QUICK_LENGTH, QUICK_SAMPLES, DemoOptions

    names = DemoOptions.__dataclass_fields__
    given = {name: value for name, value in vars(args).items() if name in names and value is not None}
    if args.quick:
        given = {"length": QUICK_LENGTH, "samples": QUICK_SAMPLES, **given}
    options = DemoOptions(**given)
    from icecache.demo.run import run_demo

    run_demo(options)
    return 0


def bench(args: argparse.Namespace) -> int:
    """Run `icecache bench`."""
    from icecache.bench.run import BenchOptions, run_bench

    names = BenchOptions.__dataclass_fields__
    run_bench(BenchOptions(**{k: v for k, v in vars(args).items() if k in names and v is not None}))
    return 0


def doctor(_: argparse.Namespace) -> int:
    """Run `icecache doctor`."""
    from icecache.doctor import main as explain

    return explain()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line.

    Parameters
    ----------
    arguments : sequence of str, optional
        Default: those of the process.

    Returns
    -------
    int
        Exit status: 0 done, 1 failed, 2 wrong arguments (raised by argparse as SystemExit), 130 interrupted.
    """
    from icecache.errors import ConfigError, IceCacheError

    parser = build_parser()
    args = parser.parse_args(arguments)
    try:
        return {"demo": demo, "bench": bench, "eval": run_command, "doctor": doctor}[args.command](args)
    except ConfigError as error:
        parser.error(str(error))
    except (IceCacheError, OSError) as error:
        print(f"icecache: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nicecache: interrupted", file=sys.stderr)
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
