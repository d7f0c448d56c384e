"""`icecache.Index` against a dict and brute force, under random operations."""

from __future__ import annotations

import copy
import pickle
import tempfile

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from icecache.index import Index, brute_force

SEED = st.integers(0, 2**32 - 1)


class IndexMachine(RuleBasedStateMachine):
    """Ids come from a small range, so that operations meet the same ones again."""

    dim, metric, dtype = 8, "ip", "float32"

    @initialize(center=st.booleans(), offset=st.sampled_from([0.0, 30.0]))
    def begin(self, center, offset):
        self.index = Index(self.dim, self.metric, dtype=self.dtype, center=center, threads=2)
        self.model: dict[int, np.ndarray] = {}
        self.offset = offset
        self.next_id = 0

    def rows(self, seed: int, n: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        rows = rng.standard_normal((n, self.dim), dtype=np.float32) + self.offset
        if n and seed % 5 == 0:  # duplicates, zeros, one large row
            rows[: n // 2] = rows[0]
            rows[-1] = 0
        if n and seed % 7 == 0:
            rows[rng.integers(n)] *= 50
        return rows

    def store(self, ids, rows) -> None:
        self.model.update(zip(ids, rows, strict=True))
        self.next_id = max([self.next_id, *(int(i) + 1 for i in ids)])

    @rule(seed=SEED, n=st.sampled_from([0, 1, 5, 16, 300, 1100, 2600]))
    def add_new(self, seed, n):
        rows = self.rows(seed, n)
        ids = self.index.add(rows)
        assert ids.tolist() == list(range(self.next_id, self.next_id + n))
        self.store(ids.tolist(), rows)

    @rule(
        seed=SEED, ids=st.lists(st.integers(0, 60), max_size=30), policy=st.sampled_from(["error", "replace", "skip"])
    )
    def add_with_ids(self, seed, ids, policy):
        rows = self.rows(seed, len(ids))
        clash = len(set(ids)) < len(ids) or any(i in self.model for i in ids)
        if policy == "error" and clash:
            before = self.index.to_bytes()
            with pytest.raises(ValueError, match="already in the index"):
                self.index.add(rows, ids)
            assert self.index.to_bytes() == before
            return
        self.index.add(rows, ids, on_conflict=policy)
        for vector_id, row in zip(ids, rows, strict=True):
            if policy != "skip" or vector_id not in self.model:
                self.model[vector_id] = row
        self.next_id = max([self.next_id, *(i + 1 for i in ids)])

    @rule(seed=SEED, at=st.integers(0, 20))
    def a_bad_row_changes_nothing(self, seed, at):
        rows = self.rows(seed, 21)
        rows[at, -1] = np.nan
        before = self.index.to_bytes()
        with pytest.raises(ValueError, match=f"row {at} "):
            self.index.add(rows)
        assert self.index.to_bytes() == before

    @rule(ids=st.lists(st.integers(0, 60), max_size=30), strict=st.booleans())
    def remove_some(self, ids, strict):
        if strict and any(i not in self.model for i in ids):
            with pytest.raises(KeyError):
                self.index.remove(ids, missing="error")
            return
        assert self.index.remove(ids) == len({i for i in ids if i in self.model})
        for i in ids:
            self.model.pop(i, None)

    @rule(share=st.floats(0, 1), seed=SEED)
    def remove_a_share(self, share, seed):
        ids = np.array(sorted(self.model), np.int64)
        gone = ids[np.random.default_rng(seed).random(len(ids)) < share]
        assert self.index.remove(gone) == len(gone)
        for i in gone.tolist():
            del self.model[i]

    @rule(way=st.sampled_from(["bytes", "pickle", "copy", "deepcopy", "file", "mmap", "snapshot"]))
    def go_on_with_a_copy(self, way):
        def through_a_file(index: Index, mmap: bool) -> Index:
            with tempfile.TemporaryDirectory() as folder:
                index.save(f"{folder}/index.ice")
                loaded = Index.load(f"{folder}/index.ice", mmap=mmap)  # a mapping outlives the file's name
                loaded.validate()
                return loaded.copy() if mmap else loaded

        make = {
            "file": lambda index: through_a_file(index, False),
            "mmap": lambda index: through_a_file(index, True),
            "snapshot": lambda index: index.snapshot().copy(),
            "bytes": lambda index: Index.from_bytes(index.to_bytes()),
            "pickle": lambda index: pickle.loads(pickle.dumps(index)),
            "copy": copy.copy,
            "deepcopy": copy.deepcopy,
        }[way]
        old = self.index
        self.index = make(old)
        old.add(np.ones((3, self.dim)))  # must not show in the copy
        old.remove(sorted(self.model)[:10])

    @rule(seed=SEED, k=st.sampled_from([1, 3, 10, 5000]), n=st.integers(0, 3))
    def exact_search_is_brute_force(self, seed, k, n):
        queries = np.random.default_rng(seed).standard_normal((n, self.dim), dtype=np.float32)
        found = self.index.search(queries, k, exact=True)
        ids = np.array(sorted(self.model), np.int64)
        rows = self.index.get(ids)  # what is stored, after rounding
        truth = brute_force(queries, rows.reshape(-1, self.dim), k, self.metric)
        scale = 1 + np.abs(truth.distances[np.isfinite(truth.distances)]).max(initial=0)
        np.testing.assert_allclose(found.distances, truth.distances, rtol=1e-4, atol=2e-5 * scale)
        assert (found.counts == min(k, len(self.model))).all()
        for row in found.ids:
            real = row[row >= 0]
            assert len(set(real.tolist())) == len(real)
            assert set(real.tolist()) <= set(self.model)

    @rule(seed=SEED, k=st.sampled_from([1, 10]), beam=st.sampled_from([None, 1, 20, 10**6]))
    def a_search_returns_live_ids_and_their_distances(self, seed, k, beam):
        query = np.random.default_rng(seed).standard_normal(self.dim, dtype=np.float32)
        found = self.index.search(query, k, beam=beam)
        assert found.counts <= len(self.model)
        if beam in (None, 10**6):
            assert found.counts == min(k, len(self.model))
        for vector_id, distance in zip(found.ids.tolist(), found.distances, strict=True):
            if vector_id < 0:
                continue
            stored = self.index.get(vector_id)
            expected = brute_force(query, stored[None], 1, self.metric).distances[0]
            np.testing.assert_allclose(distance, expected, rtol=1e-4, atol=2e-5 * (1 + abs(expected)))
        if beam == 10**6 and len(self.model):
            exact = self.index.search(query, k, exact=True)
            np.testing.assert_array_equal(exact.ids, found.ids)

    @rule()
    def compact(self):
        self.index.compact()
        assert self.index.stats()["removed"] == 0

    @rule()
    def take_a_snapshot(self):
        self.snapshot, self.then = self.index.snapshot(), dict(self.model)

    @rule(seed=SEED)
    def an_old_snapshot_is_what_it_was(self, seed):
        if not hasattr(self, "snapshot"):
            return
        self.snapshot.validate()
        assert len(self.snapshot) == len(self.then)
        assert self.snapshot.contains(sorted(self.then)).all()
        gone = [i for i in self.model if i not in self.then][:20]
        assert not self.snapshot.contains(gone).any()
        query = np.random.default_rng(seed).standard_normal(self.dim, dtype=np.float32)
        assert set(self.snapshot.search(query, 30, exact=True).ids.tolist()) - {-1} <= set(self.then)

    @rule(seed=SEED, share=st.sampled_from([0.0, 0.02, 0.5, 1.0]), as_mask=st.booleans())
    def a_filter_keeps_the_allowed_in_order(self, seed, share, as_mask):
        rng = np.random.default_rng(seed)
        allowed = rng.random(max([*self.model, 0]) + 1) < share
        query = rng.standard_normal(self.dim, dtype=np.float32)
        everything = self.index.search(query, len(self.model) + 1, exact=True).ids
        wanted = [i for i in everything.tolist() if i >= 0 and allowed[i]]
        chosen = allowed if as_mask else np.flatnonzero(allowed)
        found = self.index.search(query, len(wanted) + 1, exact=True, filter=chosen)
        assert found.ids.tolist() == [*wanted, -1]
        default = self.index.search(query, 5, filter=chosen)
        assert set(default.ids.tolist()) - {-1} <= set(wanted)
        assert default.counts == min(5, len(wanted))

    @rule(seed=SEED, rank=st.sampled_from([0, 3, 10**6]))
    def a_range_search_is_the_head_of_the_exact_result(self, seed, rank):
        query = np.random.default_rng(seed).standard_normal(self.dim, dtype=np.float32)
        everything = self.index.search(query, len(self.model), exact=True)
        if not self.model:
            return
        radius = float(everything.distances[min(rank, len(self.model) - 1)])
        found = self.index.range_search(query, radius)
        inside = everything.distances <= radius
        np.testing.assert_array_equal(found.ids, everything.ids[inside])
        np.testing.assert_array_equal(found.distances, everything.distances[inside])

    @invariant()
    def the_index_holds_the_model(self):
        if not hasattr(self, "index"):
            return
        self.index.validate()
        assert len(self.index) == len(self.model)
        ids = list(self.model)[:50]
        assert self.index.contains(ids).all()
        assert not self.index.contains([i for i in range(70) if i not in self.model]).any()
        if ids:
            tolerance = {"float32": 1e-5, "float16": 2e-3, "bfloat16": 1.6e-2, "int8": 1e-2}[self.dtype]
            rows = np.stack([self.model[i] for i in ids])
            norms = np.linalg.norm(rows, axis=1, keepdims=True)
            # Rounding is relative to the largest stored number: the row, or its distance to the mean.
            assert (np.abs(self.index.get(ids) - rows) <= tolerance * (norms + self.offset * 8 + 60)).all()


def machine(name: str, dim: int, metric: str, dtype: str) -> type:
    case = type(name, (IndexMachine,), {"dim": dim, "metric": metric, "dtype": dtype}).TestCase
    case.settings = settings(stateful_step_count=20, deadline=None)
    return case


TestIndexIp = machine("IndexIp", 8, "ip", "float32")
TestIndexL2 = machine("IndexL2", 19, "l2", "float32")
TestIndexCosine = machine("IndexCosine", 5, "cosine", "float32")
TestIndexIpF16 = machine("IndexIpF16", 16, "ip", "float16")
TestIndexL2Int8 = machine("IndexL2Int8", 24, "l2", "int8")
TestIndexL2Bf16 = machine("IndexL2Bf16", 32, "l2", "bfloat16")
