"""Tokens inserted one by one, from several threads of Python."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from icecache import _core

HEADS, DIM = 2, 8


def forest() -> _core.Forest:
    return _core.Forest(_core.PageStore(DIM, DIM, "float32"), HEADS)


def token(name: int) -> np.ndarray:
    """Keys `[H, bytes]` whose elements all are `name`."""
    return np.full((HEADS, DIM), name, np.float32).view(np.uint8)


def names(tree: _core.Forest) -> np.ndarray:
    """Names by position, `[N]`."""
    n = len(tree)  # other threads may be inserting
    keys = np.zeros((HEADS, n, DIM * 4), np.uint8)
    tree.read(0, n, keys, keys.copy())
    found = keys.view(np.float32)
    assert (found == found[:1, :, :1]).all(), "a token differs between heads"
    return found[0, :, 0]


def test_every_insert_is_found_at_its_position_whatever_thread_made_it():
    tree = forest()

    def work(thread: int) -> list[tuple[int, int]]:
        placed = []
        for i in range(150):
            name = thread * 150 + i
            position = tree.insert(token(name), token(name))
            assert names(tree)[position] == name
            placed.append((position, name))
        return placed

    with ThreadPoolExecutor(4) as threads:
        placed = [pair for pairs in threads.map(work, range(4)) for pair in pairs]
    assert len(tree) == 600
    found = names(tree)
    assert all(found[position] == name for position, name in placed)
    tree.validate()
    tree.settle()
    tree.validate()
    assert (names(tree) == found).all()


def test_a_settled_forest_of_inserts_equals_one_of_single_extensions():
    pool, inserted, extended = _core.Pool(1), forest(), forest()
    for name in range(100):
        inserted.insert(token(name), token(name))
        _core.extend(pool, [extended], [token(name)[:, None]], [token(name)[:, None]])
    inserted.settle()
    assert inserted.digest() == extended.digest()


def test_a_bad_token_is_named_and_changes_nothing():
    tree = forest()
    with pytest.raises(ValueError, match="keys: expected shape"):
        tree.insert(token(0)[:1], token(0))
    bad = token(0).copy()
    bad.view(np.float32)[1, 3] = np.inf
    with pytest.raises(ValueError, match=r"keys.*head 1"):
        tree.insert(bad, token(0))
    assert len(tree) == 0
