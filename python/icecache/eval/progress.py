"""Progress of a long run: what is done, and an estimate of the time left from the arms' own speeds."""

from __future__ import annotations

import time
from collections.abc import Callable


class Progress:
    """Counts work and its seconds by kind.

    Parameters
    ----------
    work : dict of str to float
        Units left by kind (tokens of samples, by arm).
    write : callable
        Called with a line now and then.
    every_s : float, default=10
        Seconds between lines.
    clock : callable, optional
        Seconds, for tests.
    """

    def __init__(
        self,
        work: dict[str, float],
        write: Callable[[str], None],
        every_s: float = 10.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._left, self._write, self._every_s, self._clock = dict(work), write, every_s, clock
        self._done: dict[str, float] = {}
        self._seconds: dict[str, float] = {}
        self._total = sum(work.values())
        self._began = self._last_line = clock()

    def add(self, kind: str, units: float, seconds: float, label: str) -> None:
        """Count finished work."""
        self._left[kind] = max(0.0, self._left.get(kind, 0.0) - units)
        self._done[kind] = self._done.get(kind, 0.0) + units
        self._seconds[kind] = self._seconds.get(kind, 0.0) + seconds
        now = self._clock()
        if now - self._last_line >= self._every_s:
            self._last_line = now
            share = 1 - sum(self._left.values()) / self._total if self._total else 1.0
            self._write(
                f"{label}: {share:.0%} done in {as_time(now - self._began)}, about {as_time(self.left_s())} left"
            )

    def left_s(self) -> float:
        """Estimate of the seconds left; kinds not seen yet count as the mean of those seen."""
        done = sum(self._done.values())
        mean = sum(self._seconds.values()) / done if done else 0.0
        return sum(
            left * (self._seconds[kind] / self._done[kind] if self._done.get(kind) else mean)
            for kind, left in self._left.items()
        )


def as_time(seconds: float) -> str:
    """Write 3725 as "1:02:05" and 65 as "1:05"."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"
