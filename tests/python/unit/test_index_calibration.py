"""`search(recall=)`: how many pages that takes is measured on the index, and the promise is kept on other queries."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from icecache.errors import ReadOnlyIndexError
from icecache.index import Index, SearchResult, brute_force

METRICS = ("ip", "l2", "cosine")
N, DIM, QUERIES = 6144, 32, 500
#: Two standard errors of two samples of 256 queries whose recall@10 deviates by .15.
TOLERANCE = 0.027


def data(metric: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Vectors around topics; queries for products lie elsewhere, as those of attention do."""
    rng = np.random.default_rng(seed)
    spectrum = np.arange(1, DIM + 1) ** -0.5
    topics = 2 * rng.standard_normal((150, DIM)) * spectrum

    def draw(n: int, mean: float) -> np.ndarray:
        noise = rng.standard_normal((n, DIM)) * spectrum
        return (topics[rng.integers(150, size=n)] + noise + mean).astype(np.float32)

    return draw(N, 3 if metric == "ip" else 0), draw(2 * QUERIES, 0)


@pytest.fixture(scope="module", params=METRICS)
def built(request) -> tuple[Index, np.ndarray, SearchResult]:
    """An index that knows a sample of queries, other queries, and the truth about them."""
    vectors, queries = data(request.param)
    index = Index.build(vectors, metric=request.param, queries=queries[:QUERIES])
    return index, queries[QUERIES:], brute_force(queries[QUERIES:], vectors, 10, request.param)


@pytest.mark.parametrize("recall", [0.7, 0.9, 0.95])
def test_other_queries_reach_the_recall(built, recall):
    index, queries, truth = built
    assert index.search(queries, 10, recall=recall).recall(truth) >= recall - TOLERANCE


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_stored_vectors_stand_for_queries_that_are_like_them(metric):
    vectors, queries = data(metric)
    index = Index.build(vectors, metric=metric)
    truth = brute_force(queries, vectors, 10, metric)
    for recall in (0.8, 0.95):
        assert index.search(queries, 10, recall=recall).recall(truth) >= recall - TOLERANCE


def test_stored_vectors_do_not_find_themselves():
    """Lone vectors: each is its own nearest, and the next one could be anywhere."""
    vectors = np.random.default_rng(0).standard_normal((4096, 64), dtype=np.float32)
    beams, recalls, errors = Index.build(vectors, metric="l2").calibrate(1)
    assert beams[0] == 1
    assert recalls[0] < 0.5
    assert (np.diff(beams) > 0).all()
    assert (errors < 0.04).all()


@given(recalls=st.lists(st.floats(0.01, 1), min_size=2, max_size=2).map(sorted))
def test_more_recall_finds_no_less(built, recalls):
    index, queries, truth = built
    low, high = (index.search(queries[:50], 10, recall=recall) for recall in recalls)
    part = SearchResult(truth.ids[:50], truth.distances[:50])
    assert high.recall(part) >= low.recall(part) - 0.01  # a page more can push a row out of the race


def test_all_of_it_is_an_exact_search(built):
    index, queries, truth = built
    np.testing.assert_allclose(index.search(queries, 10, recall=1).distances, truth.distances, rtol=1e-4, atol=1e-4)


def test_some_vectors_only(built):
    """The nearest of few allowed vectors are farther away: that takes more pages."""
    index, queries, _ = built
    allowed = np.arange(N) % 10 == 3
    truth = index.search(queries, 10, filter=allowed, exact=True)
    assert index.search(queries, 10, filter=allowed, recall=0.9).recall(truth) >= 0.9 - TOLERANCE
    few = index.search(queries[:5], 10, filter=[3, 4, 5], recall=0.5)
    assert few.counts.tolist() == [3] * 5
    assert index.search(queries[:2], 3, filter=[], recall=0.5).ids.tolist() == [[-1] * 3] * 2


def test_the_same_for_any_threads_copy_file_and_snapshot(built):
    index, queries, _ = built
    found = index.search(queries[:64], 10, recall=0.9, threads=2)
    curve = index.calibrate(10)
    for twin in (index.copy(), index.snapshot(), Index.from_bytes(index.to_bytes()), pickle.loads(pickle.dumps(index))):
        np.testing.assert_array_equal(twin.search(queries[:64], 10, recall=0.9, threads=1).ids, found.ids)
        assert all(np.array_equal(one, other) for one, other in zip(twin.calibrate(10), curve, strict=True))
    vectors, sample = data(index.metric)
    again = Index.build(vectors, metric=index.metric, queries=sample[:QUERIES], threads=1)
    np.testing.assert_array_equal(again.calibrate(10).recalls, curve.recalls)


def test_a_mapped_file_measures_for_itself(built, tmp_path):
    """It has no codes, so it needs other pages."""
    index, queries, truth = built
    index.save(tmp_path / "index.ice")
    mapped = Index.load(tmp_path / "index.ice", mmap=True)
    assert mapped.search(queries, 10, recall=0.9).recall(truth) >= 0.9 - TOLERANCE


def test_measured_again_after_a_quarter_of_changes():
    vectors, _ = data("l2")
    index = Index.build(vectors, metric="l2")
    first = index.calibrate(10)
    other = np.random.default_rng(1).standard_normal((N, DIM), dtype=np.float32)
    index.add(other[: N // 5])
    assert np.array_equal(index.calibrate(10).recalls, first.recalls)
    before = index.snapshot()
    index.add(other[N // 5 :])
    assert not np.array_equal(index.calibrate(10).recalls, first.recalls)
    assert np.array_equal(before.calibrate(10).recalls, first.recalls)


def test_queries_can_be_replaced_and_dropped():
    vectors, queries = data("ip")
    index = Index.build(vectors)
    rows = index.calibrate(10)
    index.set_sample(queries[:QUERIES])
    asked = index.calibrate(10)
    assert not np.array_equal(rows.recalls, asked.recalls)
    index.set_sample(np.empty((0, DIM)))
    assert np.array_equal(index.calibrate(10).recalls, rows.recalls)


def test_small_and_empty_indexes_look_at_everything():
    index = Index(DIM)
    assert index.search(np.ones(DIM), 3, recall=0.9).ids.tolist() == [-1] * 3
    vectors = data("ip")[0][:500]
    index.add(vectors)
    assert len(index.calibrate().beams) == 0
    same = brute_force(vectors[:20], vectors, 5, "ip")
    np.testing.assert_array_equal(index.search(vectors[:20], 5, recall=0.5).ids, same.ids)
    assert index.search(vectors[:3], 0, recall=0.5).ids.shape == (3, 0)
    many = Index.build(data("ip")[0])
    assert many.search(vectors[:1], 2 * N, recall=0.5).counts.tolist() == [N]


def test_bad_values_are_refused():
    index = Index.build(data("ip")[0][:2048])
    query = np.ones(DIM)
    for recall in (0, -0.5, 1.01, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="recall"):
            index.search(query, recall=recall)
    with pytest.raises(ValueError, match="recall"):
        index.search(query, recall=0.9, beam=3)
    with pytest.raises(TypeError):
        index.search(query, recall="high")
    for k in (0, 10_001):
        with pytest.raises(ValueError, match="k: "):
            index.calibrate(k)
    with pytest.raises(ValueError, match="queries: row 1"):
        index.set_sample([[0.0] * DIM, [np.nan] * DIM])
    with pytest.raises(ValueError, match="queries"):
        Index.build(np.eye(4), queries=np.eye(5))
    with pytest.raises(ReadOnlyIndexError):
        index.snapshot().set_sample(np.ones((1, DIM)))
