"""Worker threads shared by the indexes of a process."""

from __future__ import annotations

import os

from icecache import _core

_pools: dict[tuple[int, int | None], _core.Pool] = {}


def shared_pool(threads: int | None) -> _core.Pool:
    """Give the pool of `threads` workers of this process.

    Many small indexes share one pool: a pool per index would leave hundreds of parked threads. The key holds the
    process id because threads do not survive `os.fork`: a child makes its own.
    """
    key = (os.getpid(), threads)
    pool = _pools.get(key)
    if pool is None:  # two threads may both make one; `setdefault` keeps the first, and no lock is held across a fork
        pool = _pools.setdefault(key, _core.Pool(threads))
    return pool
