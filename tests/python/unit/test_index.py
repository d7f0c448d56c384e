"""`icecache.Index`: what it returns, accepts and refuses."""

from __future__ import annotations

import copy
import pickle
import threading

import numpy as np
import pytest
from icecache.index import Index, brute_force

METRICS = ("ip", "l2", "cosine")
DTYPES = ("float32", "float16", "bfloat16", "int8")


def vectors(n: int, dim: int = 24, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, dim), dtype=np.float32)


def same_neighbours(result, truth, atol: float = 1e-4) -> None:
    """Distances agree everywhere; ids wherever the neighbours are further apart than the tolerance."""
    np.testing.assert_allclose(result.distances, truth.distances, rtol=1e-4, atol=atol)
    gaps = np.diff(truth.distances, axis=-1, append=np.inf, prepend=-np.inf)
    with np.errstate(invalid="ignore"):
        clear = (gaps[..., 1:] > 2 * atol) & (gaps[..., :-1] > 2 * atol)
    clear[..., -1] = False  # the last one may tie with what did not fit
    assert (result.ids == truth.ids)[clear].all()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("n", [1, 15, 16, 17, 1023, 1024, 1025, 5000])
def test_exact_search_equals_brute_force(metric, n):
    data, queries = vectors(n), vectors(7, seed=1)
    index = Index.build(data, metric=metric)
    index.validate()
    same_neighbours(index.search(queries, 10, exact=True), brute_force(queries, data, 10, metric))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_a_narrow_dtype_is_exact_about_the_rows_it_stores(metric, dtype):
    data, queries = vectors(3000), vectors(5, seed=1)
    index = Index.build(data, metric=metric, dtype=dtype)
    stored = index.get(np.arange(3000))
    assert np.abs(stored - data).max() < {"float16": 0.01, "bfloat16": 0.06, "int8": 0.03}[dtype]
    same_neighbours(index.search(queries, 10, exact=True), brute_force(queries, stored, 10, metric), atol=3e-3)


@pytest.mark.parametrize("metric", METRICS)
def test_a_vector_is_its_own_nearest_neighbour_in_l2_and_cosine(metric):
    data = vectors(2000)
    result = Index.build(data, metric=metric).search(data[:50], 1)
    if metric != "ip":
        assert (result.ids[:, 0] == np.arange(50)).all()
        assert np.abs(result.distances).max() < 1e-6


def test_one_query_gives_one_row():
    index = Index.build(vectors(100))
    ids, distances = index.search(vectors(1)[0], 5)
    assert ids.shape == distances.shape == (5,)
    assert ids.dtype == np.int64
    assert distances.dtype == np.float32
    assert index.search(vectors(1), 5).ids.shape == (1, 5)


def test_missing_neighbours_are_padded_and_never_raise():
    result = Index.build(vectors(3)).search(vectors(2), 5)
    assert (result.ids[:, 3:] == -1).all()
    assert np.isposinf(result.distances[:, 3:]).all()
    assert result.counts.tolist() == [3, 3]
    assert np.isneginf(result.scores[:, 3:]).all()


@pytest.mark.parametrize("metric", METRICS)
def test_an_empty_index_is_an_ordinary_index(metric):
    index = Index(24, metric)
    assert len(index) == 0
    assert index.search(vectors(2), 3).counts.tolist() == [0, 0]
    assert index.search(np.empty((0, 24), np.float32), 3).ids.shape == (0, 3)
    assert index.search(vectors(2), 0).ids.shape == (2, 0)
    assert index.remove([1, 2]) == 0
    assert index.add(np.empty((0, 24))).shape == (0,)
    assert len(Index.from_bytes(index.to_bytes())) == 0


def test_distances_ascend_and_scores_are_inner_products():
    data, queries = vectors(4000), vectors(8, seed=2)
    result = Index.build(data).search(queries, 20)
    assert (np.diff(result.distances) >= 0).all()
    expected = np.einsum("qd,qkd->qk", queries, data[result.ids])
    np.testing.assert_allclose(result.scores, expected, rtol=1e-5, atol=1e-5)


def test_equal_vectors_are_returned_in_the_order_of_their_ids():
    index = Index.build(np.ones((40, 8), np.float32), ids=np.arange(40)[::-1] * 3)
    assert index.search(np.ones(8, np.float32), 40).ids.tolist() == [3 * i for i in range(40)]


def test_ids_count_up_from_the_largest_ever_used():
    index = Index(24)
    assert index.add(vectors(3)).tolist() == [0, 1, 2]
    assert index.add(vectors(2), ids=[10, 7]).tolist() == [10, 7]
    index.remove(10)
    assert index.add(vectors(2)).tolist() == [11, 12]
    index.add(vectors(1), ids=[2**63 - 1])
    with pytest.raises(ValueError, match="id"):
        index.add(vectors(1))
    assert len(index) == 7


@pytest.mark.parametrize("ids", [[1, 2, 1], [1, 5, 2]])
def test_a_refused_addition_changes_nothing(ids):
    index = Index.build(vectors(6), ids=np.arange(6) + 5)
    before = index.to_bytes()
    with pytest.raises(ValueError, match=r"already in the index|earlier"):
        index.add(vectors(3, seed=1), ids=ids)
    assert index.to_bytes() == before
    assert 1 not in index


def test_replace_lets_the_later_vector_win_and_skip_keeps_the_earlier():
    first, second = vectors(4), vectors(4, seed=1)
    index = Index.build(first)
    index.add(second, ids=[2, 3, 9, 9], on_conflict="skip")
    np.testing.assert_allclose(index.get([2, 3, 9]), [first[2], first[3], second[2]], rtol=1e-6)
    index.add(second, ids=[2, 3, 9, 9], on_conflict="replace")
    np.testing.assert_allclose(index.get([2, 3, 9]), [second[0], second[1], second[3]], rtol=1e-6)
    assert len(index) == 5
    found = index.search(second[0], 10, exact=True)
    assert sorted(found.ids[:5].tolist()) == [0, 1, 2, 3, 9]
    assert found.counts == 5


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("stride", [2, 6])
def test_a_removed_vector_is_never_found_again(metric, stride):
    """Stride 2 makes the index pack the rest again; with stride 6 removed rows stay in their pages."""
    data = vectors(3000)
    index = Index.build(data, metric=metric)
    gone = np.arange(0, 3000, stride)
    assert index.remove(gone) == len(gone)
    assert index.remove(gone) == 0
    index.validate()
    assert len(index) == 3000 - len(gone)
    assert index.stats()["removed"] == (0 if stride == 2 else len(gone))
    assert not index.contains(gone).any()
    kept = np.setdiff1d(np.arange(3000), gone)
    for exact in (True, False):
        result = index.search(data[gone[:100]], 5, exact=exact)
        assert (result.ids % stride != 0).all()
    truth = brute_force(data[gone[:100]], data[kept], 5, metric)
    np.testing.assert_array_equal(index.search(data[gone[:100]], 5, exact=True).ids, kept[truth.ids])
    with pytest.raises(KeyError, match="3001"):
        index.remove([1, 3001], missing="error")
    assert 1 in index


def test_removing_most_vectors_gives_their_memory_back():
    index = Index.build(vectors(20_000, 32))
    before = index.nbytes()
    index.remove(np.arange(1000, 20_000))
    assert index.nbytes() < before / 4
    same = index.search(vectors(5, 32, seed=3), 10, exact=True)
    truth = brute_force(vectors(5, 32, seed=3), vectors(20_000, 32)[:1000], 10)
    same_neighbours(same, truth)


def test_contains_takes_one_id_and_anything_else_is_not_in_it():
    index = Index.build(vectors(3))
    assert 2 in index
    assert np.int32(1) in index
    for other in (3, -1, 2**63, 2**80, "1", None, 1.0, True, [1, 2]):
        assert other not in index


def test_get_returns_the_given_vectors():
    data = vectors(2000) * 3 + 100
    for metric in METRICS:
        index = Index.build(data, metric=metric)
        np.testing.assert_allclose(index.get(np.arange(2000)), data, rtol=1e-5)
        assert index.get(5).shape == (24,)
    with pytest.raises(KeyError, match="2000"):
        index.get([1, 2000])


@pytest.mark.parametrize("center", [True, False])
def test_adding_a_constant_to_every_key_never_changes_the_ip_ranking(center):
    # Multiples of 1/64 below 2**9: sums and products are exact, so rankings can be compared with ==.
    rng = np.random.default_rng(0)
    data = rng.integers(-64, 65, (4000, 16)).astype(np.float32) / 64
    queries = rng.integers(-64, 65, (20, 16)).astype(np.float32) / 64
    plain = Index.build(data, center=center).search(queries, 10, exact=True)
    moved_index = Index.build(data + 200.0, center=center)
    moved = moved_index.search(queries, 10, exact=True)
    constant = -(queries.sum(1, keepdims=True) * 200.0)
    np.testing.assert_allclose(moved.distances - constant, plain.distances, atol=2e-3)
    # Same ids except among exact ties of the plain ranking, where rounding may choose.
    for row in range(20):
        worst = plain.distances[row, -1]
        assert set(plain.ids[row][plain.distances[row] < worst - 5e-3]) <= set(moved.ids[row])


def test_a_large_common_part_does_not_spoil_the_default_search():
    rng = np.random.default_rng(1)
    data = vectors(8000, 64) + rng.standard_normal(64).astype(np.float32) * 30
    queries = vectors(50, 64, seed=5)
    found, truth = Index.build(data).search(queries, 10), brute_force(queries, data, 10)
    assert np.mean([len(set(a) & set(b)) / 10 for a, b in zip(found.ids, truth.ids, strict=True)]) >= 0.95


def test_any_layout_and_number_type_is_accepted():
    data = vectors(64)
    expected = Index.build(data).search(data[:3], 4)
    readonly = data.copy()
    readonly.flags.writeable = False
    wide = np.zeros((64, 48), np.float32)
    wide[:, ::2] = data
    views = [readonly, np.asfortranarray(data), wide[:, ::2], data[::-1][::-1], data.astype(np.float64), data.tolist()]
    for view in views:
        found = Index.build(view).search(np.asarray(view)[:3], 4)
        assert (found.ids == expected.ids).all()
        np.testing.assert_array_equal(found.distances, expected.distances)


def test_a_mapped_file_is_accepted(tmp_path):
    data = vectors(64)
    np.save(tmp_path / "rows.npy", data)
    index = Index.build(np.load(tmp_path / "rows.npy", mmap_mode="r"))
    np.testing.assert_array_equal(index.search(data, 3).ids, Index.build(data).search(data, 3).ids)


def test_torch_tensors_are_accepted_and_another_device_is_refused():
    torch = pytest.importorskip("torch")
    data = vectors(64)
    expected = Index.build(data, metric="l2").search(data, 3)
    tensor = torch.from_numpy(data)
    assert (Index.build(tensor, metric="l2").search(tensor, 3).ids == expected.ids).all()
    half = Index.build(tensor.bfloat16(), metric="l2", dtype="bfloat16", center=False)
    assert (half.get(torch.arange(64)) == tensor.bfloat16().float().numpy()).all()
    with pytest.raises(TypeError, match=r"\.cpu\(\)"):
        Index.build(tensor, metric="l2").add(tensor.to("meta"))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda index: index.add(np.full((2, 24), np.nan)), ValueError, "row 0"),
        (lambda index: index.add(np.vstack([np.zeros((4, 24)), np.full((1, 24), np.inf)])), ValueError, "row 4"),
        (lambda index: index.add(np.full((1, 24), 1e300)), ValueError, "row 0"),
        (lambda index: index.add(np.full((1, 24), 1e30)), ValueError, "row 0"),
        (lambda index: index.search(np.full((1, 24), np.nan)), ValueError, "queries: row 0"),
        (lambda index: index.add(np.zeros((2, 23))), ValueError, r"24.*\(2, 23\)"),
        (lambda index: index.add(np.zeros((2, 2, 24))), ValueError, r"\(2, 2, 24\)"),
        (lambda index: index.add([[1.0, 2.0], [3.0]]), ValueError, "rectangular"),
        (lambda index: index.add(np.zeros((2, 24), complex)), TypeError, "complex"),
        (lambda index: index.add(np.array([["a"] * 24])), TypeError, "vectors"),
        (lambda index: index.add(vectors(2), ids=[1, -1]), ValueError, "-1 at row 1"),
        (lambda index: index.add(vectors(1), ids=[2**63]), ValueError, str(2**63)),
        (lambda index: index.add(vectors(2), ids=[1.0, 2.0]), TypeError, "float64"),
        (lambda index: index.add(vectors(2), ids=[1]), ValueError, "ids"),
        (lambda index: index.add(vectors(2), on_conflict="maybe"), ValueError, "on_conflict"),
        (lambda index: index.remove([0], missing="maybe"), ValueError, "missing"),
        (lambda index: index.search(vectors(1), -1), ValueError, "k"),
        (lambda index: index.search(vectors(1), 10**15), MemoryError, "bytes"),
        (lambda index: index.search(vectors(1), 2**62), MemoryError, "bytes"),
        (lambda index: index.search(vectors(1), 2**63), ValueError, "k"),
        (lambda index: index.search(vectors(1), 2.0), TypeError, "k"),
        (lambda index: index.search(vectors(1), beam=0), ValueError, "beam"),
        (lambda index: index.search(vectors(1), "3"), TypeError, "k: expected an int, got '3'"),
        (lambda index: index.search(vectors(1), beam="3"), TypeError, "beam: expected an int, got '3'"),
        (lambda index: index.search(vectors(1), recall="0.9"), TypeError, "recall: expected a number, got '0.9'"),
        (lambda index: index.search(vectors(1), out=(np.zeros((1, 10), np.int64),)), TypeError, "out: .* got tuple"),
        (lambda index: index.range_search(vectors(1), "1"), TypeError, "radius: expected a number, got '1'"),
        (lambda index: index.search_pages(vectors(1), 2, group=2**70), ValueError, f"group: .* got {2**70}"),
        (lambda index: index.search_pages(vectors(1), 2, scaling="1"), TypeError, "scaling: .* got '1'"),
        (lambda index: index.add(np.ma.masked_less(vectors(2), 0)), ValueError, "vectors: .*masked"),
        (lambda index: index.add(vectors(2), progress=3), TypeError, "progress: expected a callable, got 3"),
        (lambda index: index.save(None), TypeError, "file: expected a path or an open binary file, got None"),
        (lambda _: Index.load(3), TypeError, "file: expected a path or an open binary file, got 3"),
        (lambda _: Index(8, None), ValueError, "metric: expected 'ip', 'l2' or 'cosine', got None"),
        (lambda _: Index(8, dtype=4), ValueError, "dtype: expected .* got 4"),
        (lambda _: Index(8, threads="2"), TypeError, "threads: expected an int, got '2'"),
        (lambda _: Index(0), ValueError, "dim"),
        (lambda _: Index(8, "hamming"), ValueError, "hamming"),
        (lambda _: Index(8, dtype="int4"), ValueError, "int4"),
        (lambda _: Index(8, threads=0), ValueError, "threads"),
        (lambda _: Index.build(np.zeros(4)), ValueError, "vectors"),
        (lambda _: brute_force(vectors(1), vectors(3), metric="x"), ValueError, "metric"),
        (lambda _: brute_force(vectors(1), vectors(3) * np.nan), ValueError, "row 0"),
    ],
)
def test_bad_input_is_refused_by_name_and_changes_nothing(call, error, message):
    index = Index.build(vectors(20))
    before = index.to_bytes()
    with pytest.raises(error, match=message):
        call(index)
    assert index.to_bytes() == before


def test_a_value_too_large_for_the_dtype_is_refused():
    index = Index(24, dtype="float16")
    with pytest.raises(ValueError, match="row 1"):
        index.add(np.vstack([np.zeros(24), np.full(24, 1e5)]))
    assert len(index) == 0


class Subclass(Index):
    __slots__ = ()


def test_a_pickle_keeps_a_subclass():
    assert type(pickle.loads(pickle.dumps(Subclass.build(vectors(20))))) is Subclass


def test_copies_and_pickles_are_independent():
    index = Index.build(vectors(1500), metric="cosine", dtype="float16")
    queries = vectors(4, seed=4)
    expected = index.search(queries, 5)
    twins = [copy.copy(index), copy.deepcopy(index), index.copy(), pickle.loads(pickle.dumps(index))]
    index.remove(np.arange(1500))
    index.add(vectors(30, seed=9), ids=np.arange(5000, 5030))
    for twin in twins:
        twin.validate()
        found = twin.search(queries, 5)
        assert (found.ids == expected.ids).all()
        np.testing.assert_array_equal(found.distances, expected.distances)
        twin.add(vectors(10), ids=np.arange(7000, 7010))
    assert len(index) == 30
    assert 7000 not in index


def test_the_number_of_threads_changes_nothing():
    data, queries = vectors(9000, 40), vectors(50, 40, seed=1)
    one, three = Index.build(data, threads=1), Index.build(data, threads=3)
    assert one.to_bytes() == three.to_bytes()
    for left, right in zip(one.search(queries, 10), three.search(queries, 10), strict=True):
        np.testing.assert_array_equal(left, right)
    single = [one.search(query, 10).ids for query in queries]
    np.testing.assert_array_equal(np.stack(single), three.search(queries, 10).ids)


def test_searches_during_writes_see_whole_calls_and_every_finished_one():
    """One writer adds and removes in blocks of 8 equal vectors; a search finds all of a block or none of it."""
    index, block = Index(16, "l2"), 8
    done, stop, problems = [0], threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            finished = done[0]
            if not finished:
                continue
            target = finished - 1
            ids = index.search(np.full(16, float(target), np.float32), block, exact=True).ids
            mine = ids[(ids >= target * block) & (ids < (target + 1) * block)]
            removed = done[0] > target + 200
            if len(mine) not in ((0, block) if removed else (block,)):
                problems.append((target, ids.tolist()))

    readers = [threading.Thread(target=read) for _ in range(2)]
    for reader in readers:
        reader.start()
    for step in range(600):
        index.add(np.full((block, 16), float(step), np.float32), ids=np.arange(step * block, (step + 1) * block))
        done[0] = step + 1
        if step >= 300:
            index.remove(np.arange((step - 300) * block, (step - 299) * block))
    stop.set()
    for reader in readers:
        reader.join()
    assert not problems, problems[:3]
    index.validate()
    assert len(index) == 300 * block


def test_the_index_needs_no_torch():
    import subprocess
    import sys

    code = "import sys, icecache; icecache.Index(4); assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_repr_names_what_it_is():
    assert repr(Index.build(vectors(3), metric="l2")) == "Index(dim=24, metric='l2', dtype='float32', vectors=3)"


def test_a_forked_process_searches_with_threads_of_its_own():
    import subprocess
    import sys

    code = """
import os
import numpy as np
from icecache.index import Index
rows = np.random.default_rng(0).standard_normal((4000, 16), dtype=np.float32)
index = Index.build(rows, threads=2)
expected = index.search(rows[:40], 3).ids
child = os.fork()
if child == 0:
    index.add(rows[:3])
    same = (index.search(rows[:40], 3, exact=True).ids >= 0).all() and len(index) == 4003
    os._exit(0 if same else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
assert (index.search(rows[:40], 3).ids == expected).all()
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=60)


def test_a_process_forked_during_a_write_reads_and_is_told_how_to_write():
    import subprocess
    import sys

    code = """
import os, signal, threading
import numpy as np
from icecache.index import Index
rows = np.random.default_rng(0).standard_normal((2000, 16), dtype=np.float32)
index, inside, forked = Index.build(rows, threads=1), threading.Event(), threading.Event()
writer = threading.Thread(target=lambda: index.add(rows, progress=lambda *_: (inside.set(), forked.wait())[1]))
writer.start()
inside.wait()
child = os.fork()
if child == 0:
    signal.alarm(30)  # a child that waits for ever ends with a signal
    assert (index.search(rows[:40], 3).ids >= 0).all()
    try:
        index.add(rows[:3])
    except RuntimeError as error:
        assert "copy()" in str(error), error
        twin = index.copy()
        twin.add(rows[:3])
        os._exit(0 if len(twin) == 2003 else 1)
    os._exit(2)
status = os.waitpid(child, 0)[1]
forked.set()
writer.join()
assert os.waitstatus_to_exitcode(status) == 0, status
index.add(rows)
assert len(index) == 6000
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("metric", ["ip", "l2", "cosine"])
@pytest.mark.parametrize("beam", [None, 20])
def test_a_query_has_the_same_result_in_any_batch(metric, beam):
    """Queries are searched in tiles, on any number of threads; here by codes, with rows removed and one not sealed."""
    vectors = np.random.default_rng(8).standard_normal((6001, 40), dtype=np.float32)
    index = Index.build(vectors, metric=metric)
    index.remove(np.arange(0, 6001, 7))
    queries = vectors[:39] + 0.1
    together = index.search(queries, 5, beam=beam, threads=1)
    assert index.search(queries, 5, beam=beam, threads=2).ids.tolist() == together.ids.tolist()
    alone = [index.search(query, 5, beam=beam) for query in queries]
    assert [found.ids.tolist() for found in alone] == together.ids.tolist()
    assert [found.distances.tolist() for found in alone] == together.distances.tolist()
