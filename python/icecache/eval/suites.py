"""The registry of suites: one line a suite, one module a suite that exposes `SUITE`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from icecache.errors import ConfigError
from icecache.eval.gsm8k.suite import AUTHORS as GSM8K_AUTHORS
from icecache.eval.gsm8k.suite import SUITE as GSM8K
from icecache.eval.longbench.suite import AUTHORS as LONGBENCH_AUTHORS
from icecache.eval.longbench.suite import CLEAN as LONGBENCH_CLEAN
from icecache.eval.longbench.suite import SUITE as LONGBENCH
from icecache.eval.needle.suite import SUITE as NEEDLE
from icecache.eval.passkey import SUITE as PASSKEY
from icecache.eval.ruler.suite import OFFLINE as RULER_OFFLINE
from icecache.eval.ruler.suite import SUITE as RULER
from icecache.eval.task import Suite, Task

SUITES: Final[Mapping[str, Suite]] = MappingProxyType(
    {
        suite.name: suite
        for suite in (
            NEEDLE,
            PASSKEY,
            *(RULER, RULER_OFFLINE),
            *(LONGBENCH, LONGBENCH_AUTHORS, LONGBENCH_CLEAN),
            *(GSM8K, GSM8K_AUTHORS),
        )
    }
)
PROTOCOLS: Final = ("official", "authors", "clean")


def with_protocol(suites: tuple[str, ...], protocol: str) -> tuple[str, ...]:
    """Names of the suites in a protocol: "longbench" becomes "longbench-authors"; suites without it stay as they are.

    Raises
    ------
    ConfigError
        If there is no such protocol.
    """
    if protocol not in PROTOCOLS:
        msg = f"--protocol must be one of {', '.join(PROTOCOLS)}, got {protocol!r}"
        raise ConfigError(msg)
    return tuple(name if f"{name}-{protocol}" not in SUITES else f"{name}-{protocol}" for name in suites)


def choose_tasks(suites: tuple[str, ...], tasks: tuple[str, ...] = ()) -> tuple[Task, ...]:
    """Tasks by name.

    Parameters
    ----------
    suites : tuple of str
        Keys of :data:`SUITES`.
    tasks : tuple of str, default=()
        Names of tasks of these suites; empty: each suite's default.

    Raises
    ------
    ConfigError
        If a suite or task is unknown; the message lists what there is.
    """
    unknown = [name for name in suites if name not in SUITES]
    if unknown or not suites:
        msg = f"--suite must name suites of {', '.join(SUITES)}, got {', '.join(unknown) or 'none'}"
        raise ConfigError(msg)
    offered = {task.name: task for name in suites for task in SUITES[name].tasks}
    missing = [name for name in tasks if name not in offered]
    if missing:
        msg = f"--tasks must name tasks of {', '.join(offered)}, got {', '.join(missing)}"
        raise ConfigError(msg)
    if tasks:
        return tuple(offered[name] for name in dict.fromkeys(tasks))
    chosen = [t for name in suites for t in SUITES[name].tasks if t.name in (SUITES[name].default_tasks or offered)]
    return tuple({task.name: task for task in chosen}.values())  # suites may share tasks
