"""Options of the demo, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from icecache.errors import ConfigError

BUDGETS: Final = (64, 128, 256)
DEFAULT_TASKS: Final = ("kv32", "vt3", "gsm", "chase8")
DEFAULT_LENGTH, DEFAULT_SAMPLES = 16384, 2
QUICK_LENGTH, QUICK_SAMPLES = 4096, 1
# The largest budget plus the longest question and answer leave something to retrieve from; the model's positions.
SHORTEST, LONGEST = 512, 32768
MOST_SAMPLES: Final = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    """What to show.

    Parameters
    ----------
    length : int, default=16384
        Tokens of a sample: context, question and answer. 512 to 32768.
    tasks : tuple of str, default=("kv32", "vt3", "gsm", "chase8")
        Keys of :data:`icecache.eval.needle.TASKS`, each once.
    samples : int, default=2
        Samples a task. 1 to 1000.
    out : Path, default="demo-out"
        Folder for the table and the figures; made if missing.
    seed : int, default=0
        Of the samples. Not negative.
    threads : int or None, default=None
        Threads of torch and of the index; None: the cores this process may use.

    Raises
    ------
    ConfigError
        If an option is out of range; the message names the command-line argument, its value and the range.
    """

    length: int = DEFAULT_LENGTH
    tasks: tuple[str, ...] = DEFAULT_TASKS
    samples: int = DEFAULT_SAMPLES
    out: Path = Path("demo-out")
    seed: int = 0
    threads: int | None = None

    def __post_init__(self) -> None:
        _check("--length", self.length, SHORTEST, LONGEST)
        _check("--samples", self.samples, 1, MOST_SAMPLES)
        _check("--seed", self.seed, 0, 2**31 - 1)
        if self.threads is not None:
            _check("--threads", self.threads, 1, 1024)
        if self.out.exists() and not self.out.is_dir():
            msg = f"--out must be a folder, got the file {self.out}"
            raise ConfigError(msg)
        self._check_tasks()

    def _check_tasks(self) -> None:
        from icecache.eval.needle import TASKS  # loads torch; only once the plain checks are through

        unknown = [task for task in self.tasks if task not in TASKS]
        if unknown or not self.tasks:
            msg = f"--tasks must name tasks of {', '.join(TASKS)}, got {', '.join(unknown) or 'none'}"
            raise ConfigError(msg)
        if len(set(self.tasks)) != len(self.tasks):
            msg = f"--tasks must name each task once, got {', '.join(self.tasks)}"
            raise ConfigError(msg)


def _check(argument: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        msg = f"{argument} must be in {low}..{high}, got {value}"
        raise ConfigError(msg)
