"""`icecache eval harness`: tasks of lm-evaluation-harness with several policies, one file an arm and setup."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from icecache.errors import ConfigError, DataError
from icecache.eval.arms import Arm
from icecache.eval.machine import describe_run, package_version, this_command
from icecache.eval.model import ModelSource, check_device, load_model, open_model
from icecache.eval.options import EvalOptions
from icecache.eval.record import Setup

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

    from icecache.eval.harness.model import IceHFLM


@dataclass(frozen=True, slots=True, kw_only=True)
class HarnessOptions:
    """What to run.

    Parameters
    ----------
    run : EvalOptions
        Folder, model, policies, budgets, controls, setups, limit, device and dtype; its suites are not used.
    tasks : tuple of str
        Names of tasks or groups in the harness.
    chat_template : bool, default=False
        As its `--apply_chat_template`; the six sets of LongBench without a template stay so.
    multiturn : bool, default=False
        As its `--fewshot_as_multiturn`.
    include : Path or None, default=None
        Folder with further task descriptions, as its `--include_path`.
    """

    run: EvalOptions
    tasks: tuple[str, ...]
    chat_template: bool = False
    multiturn: bool = False
    include: Path | None = None


def run_harness(options: HarnessOptions, report: Callable[[str], None]) -> None:
    """Run every arm in every setup; arms whose results lie in the folder are left out.

    Parameters
    ----------
    options : HarnessOptions
        What to run.
    report : callable
        Takes lines: the main metrics of each arm.

    Raises
    ------
    ConfigError
        If an option or a task is unknown, or a request cannot be served.
    DataError
        If lm-eval is not installed, or a task's data cannot be had.
    """
    check_device(options.run.device)
    manager = _manager(options)
    source = open_model(options.run.model)
    options.run.out.mkdir(parents=True, exist_ok=True)
    todo = [(arm, setup) for setup in options.run.setup for arm in options.run.arms()]
    lm: IceHFLM | None = None
    for arm, setup in todo:
        path = options.run.out / f"{arm.name}-{setup}.json"
        if not path.exists():
            lm = lm or _model(options, source)
            lm.use(arm, setup)
            _write(path, options, source, arm, setup, _evaluate(lm, manager, options), lm)
        for line in _lines(arm, setup, json.loads(path.read_text(encoding="utf-8"))):
            report(line)


def _manager(options: HarnessOptions) -> TaskManager:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        msg = f"this engine needs `pip install icecache[eval]` ({error})"
        raise DataError(msg) from error
    manager = TaskManager(include_path=str(options.include) if options.include else None)
    unknown = sorted(set(options.tasks) - set(manager.all_tasks))
    if unknown or not options.tasks:
        msg = f"--tasks must name tasks that lm-eval has (`lm-eval ls tasks`), got {', '.join(unknown) or 'none'}"
        raise ConfigError(msg)
    try:
        manager.load(list(options.tasks))
    except Exception as error:  # whatever its tasks, `datasets` or the hub raise
        msg = f"lm-eval cannot load {', '.join(options.tasks)} ({type(error).__name__}: {error})"
        raise DataError(msg) from error
    return manager


def _model(options: HarnessOptions, source: ModelSource) -> IceHFLM:
    from icecache.eval.harness.model import IceHFLM

    model = load_model(source, options.run.device, options.run.dtype_name())
    return IceHFLM(model, source.tokenizer, base=options.run.base_config(), dense=options.run.dense_layers)


def _evaluate(lm: IceHFLM, manager: TaskManager, options: HarnessOptions) -> dict[str, dict[str, object]]:
    from lm_eval import simple_evaluate

    lm.served.clear()
    found = simple_evaluate(
        model=lm,
        tasks=list(options.tasks),
        task_manager=manager,
        limit=options.run.limit,
        apply_chat_template=options.chat_template,
        fewshot_as_multiturn=options.multiturn,
        random_seed=options.run.seed,
        bootstrap_iters=0,
        log_samples=True,
    )
    return {"results": found["results"], "samples": found["samples"]}


def _write(
    path: Path,
    options: HarnessOptions,
    source: ModelSource,
    arm: Arm,
    setup: Setup,
    found: dict[str, dict[str, object]],
    lm: IceHFLM,
) -> None:
    """Write one arm's results at once: a file that is there is whole."""
    content = {
        "arm": arm.name,
        "setup": setup,
        "model": source.name,
        "model_sha256": source.sha256,
        "lm_eval": package_version("lm_eval"),
        "run": asdict(describe_run(this_command(), options.run.device)),
        **found,
        "requests": [asdict(served) for served in lm.served],
    }
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(content, ensure_ascii=False, default=str, indent=1), encoding="utf-8")
    unfinished.rename(path)


def _lines(arm: Arm, setup: Setup, content: dict[str, dict[str, dict[str, object]]]) -> list[str]:
    lines = []
    for task, metrics in content["results"].items():
        for name, value in metrics.items():
            if isinstance(value, float) and "stderr" not in name:
                lines.append(f"{arm.name:20} {setup}  {task:28} {name:32} {value:.4f}")
    return lines
