"""Page memory of `icecache._core`: limits, sharing, and giving it back."""

from __future__ import annotations

import gc

import numpy as np
import pytest
from forest_tools import flip, gather, make, random_rows, read
from icecache import _core


def test_page_memory_returns_to_zero():
    rows = [random_rows(seed, 2, n, 32, "float32") for seed, n in enumerate([2500, 40])]
    store, forests = make(rows)
    assert store.used_bytes() >= sum(keys.nbytes * 2 for keys in rows)
    assert store.used_bytes() == sum(sum(forest.n_pages()) for forest in forests) * store.page_bytes
    assert store.reserved_bytes() >= store.used_bytes()
    selection = _core.all_pages(forests)
    held = store.used_bytes()
    del forests
    gc.collect()
    assert store.used_bytes() == held, "a selection keeps its pages alive"
    del selection
    gc.collect()
    assert store.used_bytes() == 0


def test_pages_are_reused_after_they_are_given_back():
    keys = random_rows(0, 1, 4000, 32, "float32")
    store, forests = make([keys])
    reserved = store.reserved_bytes()
    for _ in range(3):
        del forests
        forests = [_core.Forest(store, 1)]
        _core.extend(_core.Pool(1), forests, [keys], [flip(keys)])
    assert store.reserved_bytes() == reserved


def test_a_fork_shares_pages_and_writes_apart():
    keys = random_rows(0, 2, 2100, 32, "float32")
    store, (parent,) = make([keys])
    before = store.used_bytes()
    children = [parent.fork() for _ in range(8)]
    assert store.used_bytes() <= before * 1.25
    pool = _core.Pool(1)
    for number, child in enumerate(children):
        new = random_rows(100 + number, 2, 3, 32, "float32")
        _core.extend(pool, [child], [new], [flip(new)])
    for number, child in enumerate(children):
        child.validate()
        stored, _ = read(child, 2100, 2103, store)
        np.testing.assert_array_equal(stored, random_rows(100 + number, 2, 3, 32, "float32"))
    assert len(parent) == 2100
    np.testing.assert_array_equal(read(parent, 0, 2100, store)[0], keys)


def test_a_crop_gives_pages_back_and_equals_a_build_of_the_prefix():
    keys = random_rows(0, 1, 3000, 32, "float32")
    store, (forest,) = make([keys])
    for n in (2999, 2048, 2047, 1500, 17, 0):
        forest.crop(n)
        forest.validate()
        _, (fresh,) = make([np.ascontiguousarray(keys[:, :n])])
        assert forest.digest() == fresh.digest(), n
        assert store.used_bytes() <= (n // 16 + 2) * store.page_bytes


@pytest.mark.parametrize("more", [1, 40, 1024])
def test_a_memory_limit_is_an_error_that_leaves_the_forest_usable(more):
    keys = random_rows(0, 2, 1040, 32, "float32")
    page = 16 * 32 * 4 * 2
    store, (forest,) = make([keys], limit_bytes=page * 2 * 65)
    digest, used = forest.digest(), store.used_bytes()
    assert used == page * 2 * 65
    new = random_rows(5, 2, max(more, 17), 32, "float32")
    with pytest.raises(MemoryError, match=r"\d+ bytes needed, \d+ available"):
        _core.extend(_core.Pool(2), [forest], [new], [flip(new)])
    assert (forest.digest(), store.used_bytes(), len(forest)) == (digest, used, 1040)
    forest.validate()
    np.testing.assert_array_equal(read(forest, 0, 1040, store)[0], keys)
    forest.crop(1024)
    _core.extend(_core.Pool(2), [forest], [new[:, :10].copy()], [flip(new[:, :10])])
    assert len(forest) == 1034


def test_one_row_over_the_limit_stops_the_whole_call_before_it_starts():
    rows = [random_rows(seed, 1, n, 32, "float32") for seed, n in enumerate([16, 16])]
    page = 16 * 32 * 4 * 2
    store, forests = make(rows, limit_bytes=page * 4)
    big = random_rows(7, 1, 160, 32, "float32")
    with pytest.raises(MemoryError):
        _core.extend(_core.Pool(1), forests, [rows[0], big], [flip(rows[0]), flip(big)])
    for forest, keys in zip(forests, rows, strict=True):
        forest.validate()
        assert len(forest) in (16, 32), "all or nothing per row"
        np.testing.assert_array_equal(read(forest, 0, 16, store)[0], keys)
    assert len(forests[1]) == 16


def test_keys_alone_can_be_stored():
    store = _core.PageStore(32, 0, "float32")
    forest = _core.Forest(store, 1)
    keys = random_rows(0, 1, 100, 32, "float32")
    nothing = np.empty((1, 100, 0), np.uint8)
    _core.extend(_core.Pool(1), [forest], [keys], [nothing])
    selection = _core.all_pages([forest])
    stored, values, copied = gather(_core.Pool(1), selection, store)
    assert copied == keys.nbytes
    assert values.size == 0
    assert stored.any()
    assert forest.index_bytes() > 0
