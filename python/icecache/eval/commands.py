"""`icecache eval ...`: arguments only; what does the work is imported when it runs, so that `--help` is instant."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from icecache.arguments import count_list, task_list

if TYPE_CHECKING:
    Commands = argparse._SubParsersAction[argparse.ArgumentParser]


def add_eval_parser(commands: Commands) -> None:
    """Add `eval` and its subcommands."""
    evaluate = commands.add_parser(
        "eval",
        help="answers of a model under a budget, beside full attention and other policies",
        description="Run benchmarks with several cache policies on the same prompts, and compare them pair by pair.",
        allow_abbrev=False,
    )
    parts = evaluate.add_subparsers(dest="part", required=True, metavar="PART")
    _add_run(parts)
    _add_report(parts)
    _add_attention(parts)
    _add_paper(parts)
    _add_data(parts)
    _add_harness(parts)


def _add_run(parts: Commands) -> None:
    run = parts.add_parser(
        "run",
        help="run policies on suites of tasks",
        description="Every policy at every budget answers the same prompts; controls that can fail run along. Each "
        "batch is saved as it ends: --resume goes on where a run stopped, also with more tasks or policies.",
        allow_abbrev=False,
    )
    run.add_argument("--out", type=Path, required=True, metavar="DIR", help="for samples.jsonl and manifest.json")
    run.add_argument("--model", metavar="M", help="needle-3m (default, shipped), a folder, or a hub id")
    run.add_argument("--suite", type=task_list, metavar="A,B,...", help="default needle")
    run.add_argument(
        "--protocol",
        metavar="P",
        help="official (default), authors (the paper's scripts) or clean, for suites that vary",
    )
    run.add_argument("--tasks", type=task_list, metavar="A,B,...", help="of these suites (default: each suite's own)")
    run.add_argument(
        "--lengths", type=count_list, metavar="N,N,...", help="tokens of prompt and answer, such as 8k,32k"
    )
    run.add_argument("--policies", type=task_list, metavar="A,B,...", help="default icecache")
    run.add_argument("--budgets", type=count_list, metavar="N,N,...", help="tokens attended (default 64,256)")
    run.add_argument("--controls", type=task_list, metavar="A,B,...", help="default all; none: policies only")
    run.add_argument(
        "--setup", type=task_list, metavar="A,B", help="A: question in the dense prefill; B: sparse (default)"
    )
    run.add_argument("--limit", type=int, metavar="N", help="samples a task and length (default: each suite's own)")
    run.add_argument("--data-dir", type=Path, metavar="DIR", help="official data files (default: the hub)")
    run.add_argument("--resume", action="store_true", default=None, help="go on with the records in --out")
    run.add_argument("--device", help="cpu (default), cuda, ...")
    run.add_argument("--dtype", help="float32, bfloat16 or float16 (default: float32 on a CPU, else bfloat16)")
    run.add_argument("--batch", type=int, metavar="N", help="samples of one shape run together (default 1)")
    run.add_argument("--seed", type=int, help="of samples and policies (default 0)")
    run.add_argument(
        "--dense-layers", choices=["matched", "published"], help="the same in all arms (default), or each policy's"
    )
    run.add_argument(
        "--set", dest="settings", action="append", metavar="KEY=VALUE", help="a setting of IceConfig; repeatable"
    )


def _add_report(parts: Commands) -> None:
    report = parts.add_parser("report", help="tables of a run", allow_abbrev=False)
    report.add_argument("folder", type=Path, metavar="DIR", help="of a run")
    report.add_argument("--budget", type=int, metavar="N", help="of the headline table (default: the smallest)")
    report.add_argument("--out", type=Path, metavar="FILE", help="default: report.md in the folder, and the terminal")
    report.add_argument(
        "--format", type=task_list, default=("md",), metavar="A,B", help="md (default), html: a page with figures"
    )
    compare = parts.add_parser(
        "compare",
        help="two arms, or two runs, pair by pair",
        description="One folder with --arms X,Y, or two folders: every arm they share, or --arms X,Y of the first and "
        "the second.",
        allow_abbrev=False,
    )
    compare.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="one or two")
    compare.add_argument("--arms", type=task_list, metavar="X,Y", help="such as icecache@64,quest@256")
    pool = parts.add_parser(
        "pool",
        help="every arm against full attention, over the runs of several models together",
        allow_abbrev=False,
    )
    pool.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="one run a model")
    pool.add_argument("--arms", type=task_list, metavar="X,Y,...", help="such as icecache@256 (default: all)")
    pool.add_argument("--out", type=Path, metavar="FILE", help="write it there, too")
    merge = parts.add_parser("merge", help="one folder of several runs of one model", allow_abbrev=False)
    merge.add_argument("folders", type=Path, nargs="+", metavar="DIR", help="of runs")
    merge.add_argument("--out", type=Path, required=True, metavar="DIR", help="the folder to make")
    parts.add_parser(
        "selftest",
        help="the shipped model must answer under a budget, and must not without retrieval; 2 minutes at most",
        allow_abbrev=False,
    )


def _add_attention(parts: Commands) -> None:
    attention = parts.add_parser(
        "attention",
        help="what policies keep of the model's attention, by layer and KV head",
        description="Captured mass, output error, top tokens, packing and search regret, and the error of the "
        "estimated mass; every policy is fed full attention's answer.",
        allow_abbrev=False,
    )
    attention.add_argument("--out", type=Path, required=True, metavar="DIR", help="for attention.json, attention.md")
    attention.add_argument("--model", metavar="M", help="needle-3m (default, shipped), a folder, or a hub id")
    attention.add_argument("--suite", type=task_list, metavar="A,B,...", help="default needle; other models: passkey")
    attention.add_argument("--tasks", type=task_list, metavar="A,B,...", help="of these suites")
    attention.add_argument("--lengths", type=count_list, metavar="N,N,...", help="tokens, such as 8k")
    attention.add_argument("--policies", type=task_list, metavar="A,B,...", help="default icecache")
    attention.add_argument("--budgets", type=count_list, metavar="N,N,...", help="tokens attended (default 64,256)")
    attention.add_argument("--limit", type=int, metavar="N", help="samples a task and length (default 2)")
    attention.add_argument("--data-dir", type=Path, metavar="DIR", help="official data files")
    attention.add_argument("--device", help="cpu (default), cuda, ...")
    attention.add_argument("--dtype", help="as in run")
    attention.add_argument("--seed", type=int, help="of samples and policies (default 0)")
    attention.add_argument("--dense-layers", choices=["matched", "published"], help="as in run")


def _add_paper(parts: Commands) -> None:
    paper = parts.add_parser(
        "paper",
        help="the runs behind the paper's tables for one of its models, and the tables of what has run",
        allow_abbrev=False,
    )
    paper.add_argument("--model", required=True, metavar="M", help="checkpoint of the paper, part of its name, folder")
    paper.add_argument("--out", type=Path, default=Path("paper"), metavar="DIR", help="of the runs (default: paper)")
    paper.add_argument("--data-dir", type=Path, default=Path("data"), metavar="DIR", help="default: data")


def _add_data(parts: Commands) -> None:
    data = parts.add_parser("data", help="official data files of a folder", allow_abbrev=False)
    actions = data.add_subparsers(dest="action", required=True, metavar="ACTION")
    check = actions.add_parser(
        "check",
        help="which are there, their rows, SHA-256 and errors with line numbers",
        description="Look for every file that the suites can use. Fails if one is broken or none is there.",
        allow_abbrev=False,
    )
    check.add_argument("folder", type=Path, metavar="DIR", help="what --data-dir will be")


def _add_harness(parts: Commands) -> None:
    harness = parts.add_parser(
        "harness",
        help="tasks of lm-evaluation-harness with several policies",
        description="Runs lm-eval's own tasks (pip install icecache[eval]) with full attention and with each policy. "
        "One file an arm and setup; arms whose file is in --out are left out.",
        allow_abbrev=False,
    )
    harness.add_argument("--out", type=Path, required=True, metavar="DIR", help="for ARM-SETUP.json")
    harness.add_argument("--tasks", type=task_list, required=True, metavar="A,B,...", help="names in lm-eval")
    harness.add_argument("--model", metavar="M", help="needle-3m (default, shipped), a folder, or a hub id")
    harness.add_argument("--policies", type=task_list, metavar="A,B,...", help="default icecache")
    harness.add_argument("--budgets", type=count_list, metavar="N,N,...", help="tokens attended (default 64,256)")
    harness.add_argument("--setup", type=task_list, metavar="A,B", help="as in run (default B)")
    harness.add_argument("--limit", type=int, metavar="N", help="documents a task")
    harness.add_argument("--chat-template", action="store_true", help="lm-eval's --apply_chat_template")
    harness.add_argument("--multiturn", action="store_true", help="lm-eval's --fewshot_as_multiturn")
    harness.add_argument("--include", type=Path, metavar="DIR", help="further tasks: lm-eval's --include_path")
    harness.add_argument("--device", help="cpu (default), cuda, ...")
    harness.add_argument("--dtype", help="as in run")


def run_command(args: argparse.Namespace) -> int:
    """Run a subcommand of `icecache eval`."""
    parts: dict[str, Callable[[argparse.Namespace], int]] = {
        "run": _run,
        "report": _report,
        "compare": _compare,
        "merge": _merge,
        "pool": _pool,
        "attention": _attention,
        "paper": _paper,
        "selftest": _selftest,
        "data": _data,
        "harness": _harness,
    }
    return parts[args.part](args)


def _run(args: argparse.Namespace) -> int:
    from icecache.eval.options import EvalOptions

    given = {k: v for k, v in vars(args).items() if k in EvalOptions.__dataclass_fields__ and v is not None}
    if args.protocol is not None:
        from icecache.eval.suites import with_protocol

        given["suite"] = with_protocol(given.get("suite", ("needle",)), args.protocol)
    if "settings" in given:
        given["settings"] = tuple(given["settings"])
    if given.get("controls") == ("none",):
        given["controls"] = ()
    options = EvalOptions(**given)
    from icecache.eval.run import run_eval

    run_eval(options)
    return 0


def _report(args: argparse.Namespace) -> int:
    from icecache.eval.report import TASK_BY_TASK, write_report

    text, written = write_report(args.folder, args.out, args.budget, args.format)
    print(text.partition(TASK_BY_TASK)[0].rstrip())
    print(f"\nwhole report: {', '.join(map(str, written))}")
    return 0


def _compare(args: argparse.Namespace) -> int:
    from icecache.eval.compare import compare

    print(compare(args.folders, args.arms or ()))
    return 0


def _pool(args: argparse.Namespace) -> int:
    from icecache.eval.pool import pool

    text = pool(args.folders, args.arms or ())
    if args.out is not None:
        args.out.write_text(text, encoding="utf-8")
    print(text)
    return 0


def _merge(args: argparse.Namespace) -> int:
    from icecache.eval.folder import merge_folders

    print(f"{merge_folders(args.folders, args.out)} records in {args.out}")
    return 0


def _attention(args: argparse.Namespace) -> int:
    from icecache.eval.options import EvalOptions

    given = {k: v for k, v in vars(args).items() if k in EvalOptions.__dataclass_fields__ and v is not None}
    options = EvalOptions(**given, controls=())
    from icecache.eval.attention import run_attention

    run_attention(options, print)
    return 0


def _paper(args: argparse.Namespace) -> int:
    from icecache.eval.paper import paper

    for paragraph in paper(args.model, args.out, args.data_dir):
        print(f"{paragraph}\n")
    return 0


def _selftest(args: argparse.Namespace) -> int:  # noqa: ARG001 - has no arguments
    from icecache.eval.selftest import selftest

    return selftest(print)


def _data(args: argparse.Namespace) -> int:
    from icecache.eval.check import report_data

    return 0 if report_data(args.folder, print) else 1


def _harness(args: argparse.Namespace) -> int:
    from icecache.eval.harness.run import HarnessOptions, run_harness
    from icecache.eval.options import EvalOptions

    names = ("out", "model", "policies", "budgets", "setup", "limit", "device", "dtype")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    options = HarnessOptions(
        run=EvalOptions(**given, controls=("full",)),
        tasks=args.tasks,
        chat_template=args.chat_template,
        multiturn=args.multiturn,
        include=args.include,
    )
    run_harness(options, print)
    return 0
