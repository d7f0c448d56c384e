"""The reference core of the runtime's tests answers what the compiled core answers, wherever both are exact."""

from __future__ import annotations

import numpy as np
import pytest
import reference_core
from icecache import _core

HEADS, GROUP, DIM, LENGTHS = 2, 3, 16, [0, 5, 16, 100, 1100]


def answers(core, keys, queries, softcap):
    """Log-sum-exps of an exact search for all pages, and the tokens of every head in order, gathered from pages."""
    pool, store = core.Pool(1), core.PageStore(DIM, DIM, "float32")
    forests = [core.Forest(store, HEADS) for _ in keys]
    raw = [k.view(np.uint8) for k in keys]
    core.extend(pool, forests, raw, raw)
    options = {"scaling": 0.3, "softcap": softcap, "exact": True}
    searched = core.search(pool, forests, queries, 10_000, **options)
    everything = core.all_pages(forests)
    shape = (*everything.pages.shape, 16, DIM * 4)
    gathered, values = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    copied = everything.gather(pool, 0, shape[2], gathered, values)
    rows = []
    for r, n in enumerate(LENGTHS):
        for h in range(HEADS):
            positions = everything.positions()[r, h].ravel()
            table = gathered[r, h].view(np.float32).reshape(-1, DIM)
            rows.append(table[positions >= 0][np.argsort(positions[positions >= 0])])
            assert sorted(positions[positions >= 0]) == list(range(n))
    np.testing.assert_array_equal(gathered, values)
    return np.asarray(searched.lse), rows, copied


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_both_cores_agree_on_masses_tokens_and_bytes(softcap):
    rng = np.random.default_rng(0)
    keys = [rng.standard_normal((HEADS, n, DIM), dtype=np.float32) for n in LENGTHS]
    queries = rng.standard_normal((len(LENGTHS), HEADS, GROUP, DIM), dtype=np.float32)
    slow, fast = (answers(core, keys, queries, softcap) for core in (reference_core, _core))
    np.testing.assert_allclose(fast[0], slow[0], atol=2e-5)
    for ours, theirs in zip(fast[1], slow[1], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert fast[2] == slow[2] == 2 * sum(LENGTHS) * HEADS * DIM * 4


def test_both_cores_refuse_a_key_that_is_not_a_number_and_keep_their_state():
    for core in (reference_core, _core):
        store = core.PageStore(DIM, DIM, "float32")
        forest = core.Forest(store, 1)
        bad = np.full((1, 3, DIM), np.nan, np.float32).view(np.uint8)
        with pytest.raises(ValueError, match="row 0"):
            core.extend(core.Pool(1), [forest], [bad], [bad])
        assert len(forest) == 0


def test_both_cores_stop_at_their_limit_with_a_memory_error():
    for core in (reference_core, _core):
        store = core.PageStore(DIM, DIM, "float32", limit_bytes=4 * 16 * 2 * DIM * 4)
        forest = core.Forest(store, 1)
        full = np.ones((1, 200, DIM), np.float32).view(np.uint8)
        with pytest.raises(MemoryError, match=r"\d+"):
            core.extend(core.Pool(1), [forest], [full], [full])
        assert len(forest) == 0
