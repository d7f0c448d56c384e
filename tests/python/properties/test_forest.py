"""The forest against a list of keys and brute force, under random operations.

Dimension key: R rows (sequences), H KV heads, G query heads per KV head, N tokens, D head dim, K pages.
"""

from __future__ import annotations

import time

import numpy as np
import pytest
from forest_tools import ITEM_BYTES, KINDS, flip, gather, logits, logsumexp, random_rows, read
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, rule
from icecache import _core

SCALING = 0.25
POOL = _core.Pool(2)


def check_selection(selection, forest, keys, queries, k, dtype, softcap) -> None:
    """What holds for every selection: unique live pages, true counts, positions, scores in order, exact lse."""
    n_heads, n = keys.shape[:2]
    width = min(k, max(forest.n_pages(), default=0))
    assert selection.pages.shape == selection.counts.shape == (1, n_heads, width)
    positions = selection.positions()
    table = logits(keys, queries[0], dtype, SCALING, softcap)
    for head in range(n_heads):
        pages, counts = selection.pages[0, head], selection.counts[0, head]
        found = min(width, forest.n_pages()[head])
        assert (pages[:found] >= 0).all()
        assert (pages[found:] == -1).all()
        assert len(set(pages[:found].tolist())) == found
        assert ((counts[:found] >= 1) & (counts[:found] <= 16)).all()
        assert (counts[found:] == 0).all()
        live = positions[0, head]
        assert ((live >= 0).sum(1) == counts).all()
        tokens = live[live >= 0]
        assert len(set(tokens.tolist())) == len(tokens)
        assert (tokens < n).all()
        assert (np.diff(selection.scores[0, head, :found]) <= 1e-5).all()
        selected = logsumexp(table[head][:, tokens])
        np.testing.assert_allclose(selection.lse[0, head, :, 1], selected, atol=2e-3, rtol=1e-4)


class ForestMachine(RuleBasedStateMachine):
    """Forks are kept beside their parents, so that a write that leaks into a sibling is seen."""

    dim, n_heads, group, dtype = 16, 2, 2, "float32"
    forests = Bundle("forests")

    @initialize(target=forests)
    def begin(self):
        self.store = _core.PageStore(self.dim, self.dim, self.dtype)
        self.alive: list[tuple[_core.Forest, list[np.ndarray]]] = []
        return self.adopt(
            _core.Forest(self.store, self.n_heads),
            np.empty((self.n_heads, 0, self.dim * ITEM_BYTES[self.dtype]), np.uint8),
        )

    def adopt(self, forest, keys):
        self.alive.append((forest, [keys]))
        return len(self.alive) - 1

    @rule(at=forests, seed=st.integers(0, 2**32 - 1), n=st.integers(0, 40), kind=st.sampled_from(KINDS))
    def extend_a_little(self, at, seed, n, kind):
        self.extend(at, seed, n, kind)

    @rule(at=forests, seed=st.integers(0, 2**32 - 1), n=st.sampled_from([0, 15, 16, 17, 500, 1023, 1024, 1025, 2100]))
    def extend_a_lot(self, at, seed, n):
        self.extend(at, seed, n, "clustered")

    def extend(self, at, seed, n, kind):
        forest, keys = self.alive[at]
        new = random_rows(seed, self.n_heads, n, self.dim, self.dtype, kind)
        _core.extend(POOL, [forest], [new], [flip(new)])
        keys[0] = np.concatenate([keys[0], new], axis=1)

    @rule(at=forests, seed=st.integers(0, 2**32 - 1))
    def a_bad_key_changes_nothing(self, at, seed):
        forest, _ = self.alive[at]
        new = random_rows(seed, self.n_heads, 20, self.dim, self.dtype)
        size = ITEM_BYTES[self.dtype]
        new[-1, 13, -size:] = 0xFF  # a NaN in every dtype
        before = forest.digest()
        with pytest.raises(ValueError, match="finite"):
            _core.extend(POOL, [forest], [new], [flip(new)])
        assert forest.digest() == before

    @rule(at=forests, share=st.floats(0, 1))
    def crop(self, at, share):
        forest, keys = self.alive[at]
        n = round(len(forest) * share)
        forest.crop(n)
        keys[0] = keys[0][:, :n]

    @rule(target=forests, at=forests)
    def fork(self, at):
        if len(self.alive) >= 5:
            return multiple()
        forest, keys = self.alive[at]
        twin = forest.fork()
        assert twin.digest() == forest.digest()
        return self.adopt(twin, keys[0])

    @rule(at=forests, start=st.floats(0, 1), stop=st.floats(0, 1))
    def read_a_range(self, at, start, stop):
        forest, keys = self.alive[at]
        first, last = sorted((round(start * len(forest)), round(stop * len(forest))))
        stored_keys, stored_values = read(forest, first, last, self.store)
        assert (stored_keys == keys[0][:, first:last]).all()
        assert (stored_values == flip(keys[0][:, first:last])).all()

    @rule(
        at=forests,
        seed=st.integers(0, 2**32 - 1),
        k=st.sampled_from([0, 1, 3, 16, 1000]),
        exact=st.booleans(),
        softcap=st.sampled_from([None, 20.0]),
    )
    def search(self, at, seed, k, exact, softcap):
        forest, keys = self.alive[at]
        queries = np.random.default_rng(seed).standard_normal((1, self.n_heads, self.group, self.dim), dtype=np.float32)
        selection = _core.search(POOL, [forest], queries, k, scaling=SCALING, softcap=softcap, exact=exact)
        check_selection(selection, forest, keys[0], queries, k, self.dtype, softcap)
        if exact:
            total = logsumexp(logits(keys[0], queries[0], self.dtype, SCALING, softcap))
            np.testing.assert_allclose(selection.lse[0, ..., 0], total, atol=2e-3, rtol=1e-4)

    @rule(at=forests)
    def all_pages_hold_every_token_once(self, at):
        forest, keys = self.alive[at]
        selection = _core.all_pages([forest])
        stored_keys, stored_values, copied = gather(POOL, selection, self.store)
        positions = selection.positions()[0]
        for head in range(self.n_heads):
            live = positions[head] >= 0
            order = positions[head][live]
            assert sorted(order.tolist()) == list(range(len(forest)))
            assert (stored_keys[0, head][live] == keys[0][head, order]).all()
            assert (stored_values[0, head][live] == flip(keys[0])[head, order]).all()
            assert not stored_keys[0, head][~live].any()
            assert not stored_values[0, head][~live].any()
        assert copied == len(forest) * self.n_heads * 2 * self.dim * ITEM_BYTES[self.dtype]

    @invariant()
    def structure_is_sound(self):
        for forest, keys in getattr(self, "alive", []):
            forest.validate()
            assert len(forest) == keys[0].shape[1]

    def teardown(self):
        if hasattr(self, "alive"):
            self.alive.clear()
            deadline = time.monotonic() + 30
            while self.store.used_bytes() and time.monotonic() < deadline:
                time.sleep(0.001)  # a tail that is being packed aside keeps its pages until that is done
            assert self.store.used_bytes() == 0, "pages outlive their forests"


def machine(name: str, dim: int, n_heads: int, group: int, dtype: str) -> type:
    fields = {"dim": dim, "n_heads": n_heads, "group": group, "dtype": dtype}
    case = type(name, (ForestMachine,), fields).TestCase
    case.settings = settings(stateful_step_count=20, deadline=None)
    return case


TestForestF32 = machine("ForestF32", 16, 2, 2, "float32")
TestForestF16 = machine("ForestF16", 80, 1, 4, "float16")
TestForestBf16 = machine("ForestBf16", 64, 3, 1, "bfloat16")
TestForestOddDim = machine("ForestOddDim", 7, 1, 7, "float32")
