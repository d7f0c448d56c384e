"""The suites: LongBench in three protocols."""

from __future__ import annotations

from typing import Final

from icecache.eval.longbench.sets import ENGLISH, SETS
from icecache.eval.longbench.task import DEFAULT_TOKENS, LongBenchTask, Protocol
from icecache.eval.task import Suite

SAMPLES: Final = 500


def _suite(protocol: Protocol, summary: str) -> Suite:
    tasks = tuple(LongBenchTask(each, protocol) for each in SETS)
    return Suite(
        name=tasks[0].suite,
        summary=summary,
        tasks=tasks,
        samples=SAMPLES,
        lengths=(DEFAULT_TOKENS,),
        default_tasks=tuple(task.name for task in tasks if task.of.name in ENGLISH),
    )


SUITE: Final = _suite(
    "official", "LongBench, 16 English sets (5 Chinese ones by name); --lengths: where prompts are cut"
)
AUTHORS: Final = _suite("authors", "LongBench as the paper's script runs it: system message and second <bos>")
CLEAN: Final = _suite("clean", "LongBench with template and answer inside the length, few-shot answers of one line")
