"""Tokens that enter the forests while decode steps run.

At a fixed step the oldest 16 tokens of a row's window are *handed over*: copied to the host and, on a thread of its
own, inserted into a continuation of the row's forest that no search sees. They stay in the window. At the step at which
they have to leave the window the forest *adopts* the continuation, all at once. So every token is attended in exactly
one place, and what is attended depends on the number of steps alone: an insert that is late is waited for.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from icecache import _core
from icecache.config import PAGE_TOKENS
from icecache.pages.move import Move, insert
from icecache.pages.shelf import Pair, joined
from icecache.pages.store import start_to_host
from icecache.stats import Recorder

if TYPE_CHECKING:
    from icecache.pages.layer import LayerPages

_THREADS = 2
"""Of a pool of our own: 16 tokens for 256 trees take some 20 ms of one core, and there are 16 steps for it."""
_NICE = 10
"""A tenth of the processor beside the thread that launches. Not less: on a machine that others use too, an insert that
gets no time at all is waited for."""
_LEAST_LEAD = 8
"""Steps between hand-over and adoption. Rows that come nearer to the latter, after a later chunk, say, are inserted at
once when they are due."""


@dataclass(frozen=True, slots=True)
class Handed:
    """The oldest window tokens of one row, on their way. Forks of the row share it."""

    ahead: _core.Ahead
    n_tokens: int
    job: Future[None]


class Inserter:
    """The background thread of one runtime and those that work for it; they start with the first job.

    All stay on the cores that search workers leave to others, and step back behind the thread that launches the model:
    a worker or a launch that loses its core for a time slice costs a token milliseconds.
    """

    def __init__(self) -> None:
        self._pool: _core.Pool | None = None
        self._thread: ThreadPoolExecutor | None = None

    def serve(self, store: _core.PageStore) -> None:
        """Let stretches of forests in `store` be packed on our cores too."""
        self._started().submit(store.start_background).result()

    def submit(self, recorder: Recorder, moves: Sequence[Move], ready: torch.cuda.Event | None) -> Future[None]:
        """Insert once `ready` has happened; the result raises what :func:`insert` raises."""
        return self._started().submit(self._run, recorder, list(moves), ready)

    def also(self, work: Callable[[_core.Pool], None]) -> Future[None]:
        """Do this behind all jobs so far; it gets the pool they use."""
        return self._started().submit(lambda: work(self._own_pool()))

    def _started(self) -> ThreadPoolExecutor:
        if self._thread is None:
            name = "icecache-insert"
            self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix=name, initializer=_step_back)
        return self._thread

    def _run(self, recorder: Recorder, moves: list[Move], ready: torch.cuda.Event | None) -> None:
        pool = self._own_pool()
        if ready is not None:
            ready.synchronize()  # sync: this thread only
        insert(pool, recorder, moves)

    def _own_pool(self) -> _core.Pool:
        if self._pool is None:
            self._pool = _core.Pool(_THREADS)  # here: its threads inherit cores and priority of this one
        return self._pool

    def close(self) -> None:
        """End the thread once its jobs are done."""
        if self._thread is not None:
            self._thread.shutdown(wait=True)
            self._thread = None


def _step_back() -> None:
    """Keep the calling thread and those it starts out of the way of launches and searches, where the system can."""
    if sys.platform != "linux":
        return
    with suppress(OSError):  # a container may forbid it
        os.sched_setaffinity(0, _core.spare_cores())
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)


def hand_over(inserter: Inserter, recorder: Recorder, layers: Sequence[LayerPages]) -> bool:
    """Start to insert the next tokens of all rows that have come so far; says whether there are any.

    Copies are enqueued on the current stream. If this raises, nothing has changed.
    """
    groups = whole_groups(layers)
    places = [(group, b) for group in groups for b in range(group[0].n_rows) if _is_ready(group[0], b)]
    if not places:
        return False
    hosted, ready = start_to_host([x for group, b in places for x in oldest(group, b, PAGE_TOKENS)])
    aheads = [group[0].forests[b].ahead() for group, b in places]
    moves = [
        Move(group[0].layer, b, ahead.forest, keys, values, followers(group))
        for (group, b), ahead, keys, values in zip(places, aheads, hosted[::2], hosted[1::2], strict=True)
    ]
    job = inserter.submit(recorder, moves, ready)
    for (group, b), ahead in zip(places, aheads, strict=True):
        for pages in group:
            pages.handed[b] = Handed(ahead, PAGE_TOKENS, job)
    return True


def whole_groups(layers: Sequence[LayerPages]) -> list[list[LayerPages]]:
    """Layers by the pages they share, leaders first; groups of which some layer is missing are left out."""
    groups: dict[int, dict[int, LayerPages]] = {}
    for pages in layers:
        groups.setdefault(id(pages.shelf), {})[pages.place] = pages
    in_order = [[group[place] for place in sorted(group)] for group in groups.values()]
    return [group for group in in_order if len(group) == group[0].shelf.n_places]


def oldest(group: Sequence[LayerPages], b: int, n: int) -> Pair:
    """Keys and rows, as they are stored, of the `n` oldest window tokens of row `b` of layers that share pages."""
    rows = [pages.near.row(b) for pages in group]
    return joined([(row.window_keys[:, :n], row.window_values[:, :n]) for row in rows])


def followers(group: Sequence[LayerPages]) -> tuple[int, ...]:
    """Layers behind the leader."""
    return tuple(pages.layer for pages in group[1:])


def _is_ready(pages: LayerPages, b: int) -> bool:
    if not pages.forests or pages.handed[b] is not None:
        return False
    window = pages.layout.window_tokens
    first = max(window + 1, PAGE_TOKENS)  # not in the step that adopts: each costs the launching thread about 2 ms
    last = max(first, window + PAGE_TOKENS - _LEAST_LEAD)
    return first <= pages.near.window_count(b) <= last


def adopt_due(recorder: Recorder, groups: Sequence[list[LayerPages]]) -> None:
    """Let the forests adopt what was handed over and is due, and the windows drop it; waits for what is late.

    Rows that changed in another way since keep their tokens in the window.

    Raises
    ------
    BadTensorError, PoolExhaustedError
        What the insert met. All tokens of that insert are still in their windows, and are no longer on the way.
    """
    due = [
        (group, b, handed)
        for group in groups
        for b, n in enumerate(group[0].due())
        if (handed := group[0].handed[b]) is not None and handed.n_tokens <= n
    ]
    for job in dict.fromkeys(handed.job for _, _, handed in due):
        _wait_for(job, recorder, [pages for group in groups for pages in group])
    for group, b, handed in due:
        forest = group[0].forests[b]
        before, counts = len(forest), [0] * group[0].n_rows
        try:
            forest.adopt(handed.ahead)
        finally:  # also after Ctrl-C: in the forest and in the window would be twice
            counts[b] = len(forest) - before
            for pages in group:
                pages.handed[b] = None
                pages.near.drop_oldest(counts)
            group[0].shelf.changes += 1


def _wait_for(job: Future[None], recorder: Recorder, layers: Sequence[LayerPages]) -> None:
    if not job.done():
        with recorder.part("insert_wait"):
            job.exception()
    error = job.exception()
    if error is None:
        return
    for pages in layers:
        pages.handed = [None if handed is not None and handed.job is job else handed for handed in pages.handed]
    raise error
