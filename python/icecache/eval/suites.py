"""The registry of suites: one line a suite, one module a suite that exposes `SUITE`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from icecache.errors import ConfigError
from icecache.eval.needle.suite import SUITE as NEEDLE
from icecache.eval.task import Suite, Task

SUITES: Final[Mapping[str, Suite]] = MappingProxyType({suite.name: suite for suite in (NEEDLE,)})


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
    return tuple(chosen)
