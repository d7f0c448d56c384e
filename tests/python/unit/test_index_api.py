"""`icecache.Index` beyond add and search: filters, snapshots, progress, output arrays, input types."""

from __future__ import annotations

import numpy as np
import pytest
from icecache.errors import CancelledError, ReadOnlyIndexError
from icecache.index import Filter, Index, SearchResult, brute_force

METRICS = ("ip", "l2", "cosine")


def vectors(n: int, dim: int = 24, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((n, dim), dtype=np.float32)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.9, 1.0])
def test_a_filtered_search_is_a_search_among_the_allowed(metric, share):
    data, queries = vectors(5000), vectors(6, seed=1)
    index = Index.build(data, metric=metric)
    index.remove(np.arange(0, 5000, 11))
    allowed = np.random.default_rng(2).random(5000) < share
    alive = np.flatnonzero(allowed & (np.arange(5000) % 11 != 0))
    truth = brute_force(queries, data[alive], 10, metric)
    wanted = np.where(truth.ids >= 0, alive[truth.ids] if len(alive) else -1, -1)
    for chosen in (allowed, np.flatnonzero(allowed), Filter(allowed), Filter(np.flatnonzero(allowed).tolist())):
        found = index.search(queries, 10, filter=chosen, exact=True)
        np.testing.assert_array_equal(found.ids, wanted)
        default = index.search(queries, 10, filter=chosen)
        assert allowed[default.ids[default.ids >= 0]].all()
        assert (default.counts == found.counts).all()
        assert default.recall(found) >= 0.9


def test_a_filter_follows_the_index_it_is_used_with():
    index, other = Index.build(vectors(3000), metric="l2"), Index.build(vectors(40), metric="l2")
    chosen = Filter([3, 7, 5000])

    def everything(of: Index) -> list[int]:
        return sorted(of.search(vectors(1)[0], 10, filter=chosen).ids.tolist(), reverse=True)[:3]

    assert everything(index) == [7, 3, -1]
    index.add(vectors(1), ids=[5000])
    assert everything(index) == [5000, 7, 3]
    assert everything(other) == [7, 3, -1]
    index.remove(7)
    assert everything(index) == [5000, 3, -1]


def test_a_filter_of_unknown_or_no_ids_finds_nothing():
    index = Index.build(vectors(100))
    for empty in ([], [100, 2**62], np.zeros(100, bool), np.zeros(0, bool)):
        assert index.search(vectors(2), 3, filter=empty).counts.tolist() == [0, 0]
    assert sorted(index.search(vectors(1)[0], 9, filter=np.ones(5, bool)).ids.tolist()) == [-1] * 4 + [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("allowed", "error"),
    [
        ([-1], ValueError),
        ([1.5], TypeError),
        ("x", TypeError),
        (np.ones((2, 2), bool), ValueError),
        ([[1]], ValueError),
    ],
)
def test_a_bad_filter_is_refused_by_name(allowed, error):
    with pytest.raises(error, match="filter"):
        Index.build(vectors(10)).search(vectors(1), filter=allowed)


def test_a_snapshot_stays_as_it_is_and_cannot_be_written_to():
    data = vectors(4000)
    index = Index.build(data[:3000], metric="l2")
    snapshot, before = index.snapshot(), index.to_bytes()
    expected = snapshot.search(data[:20], 5)
    index.remove(np.arange(0, 2000))
    index.add(data[3000:], ids=np.arange(3000, 4000))
    index.add(data[:500] + 1, ids=np.arange(2500, 3000), on_conflict="replace")
    index.compact()
    for left, right in zip(snapshot.search(data[:20], 5), expected, strict=True):
        np.testing.assert_array_equal(left, right)
    assert len(snapshot) == 3000
    assert snapshot.read_only
    assert not index.read_only
    assert "read_only" in repr(snapshot)
    assert snapshot.contains(np.arange(3000)).all()
    assert 3000 not in snapshot
    np.testing.assert_allclose(snapshot.get(np.arange(3000)), data[:3000], atol=1e-5)
    assert snapshot.to_bytes() == before
    snapshot.validate()
    for write in (
        lambda: snapshot.add(data[:1]),
        lambda: snapshot.remove([1]),
        lambda: snapshot.compact(),
    ):
        with pytest.raises(ReadOnlyIndexError, match="copy"):
            write()
    assert snapshot.snapshot().read_only
    twin = snapshot.copy()
    twin.add(data[:1] * 2)
    twin.validate()
    assert (len(twin), len(snapshot)) == (3001, 3000)


def test_compacting_frees_the_removed_and_keeps_the_rest():
    data = vectors(6000)
    index = Index.build(data, metric="cosine")
    index.remove(np.arange(500))
    assert index.stats()["removed"] == 500
    before = index.nbytes()
    index.compact()
    index.validate()
    assert index.stats()["removed"] == 0
    assert index.nbytes() < before
    np.testing.assert_allclose(index.get(np.arange(500, 6000)), data[500:], atol=1e-5)
    truth = brute_force(data[:9], data[500:], 5, "cosine")
    np.testing.assert_array_equal(index.search(data[:9], 5, exact=True).ids, truth.ids + 500)
    assert index.add(vectors(1)).tolist() == [6000]
    Index(8).compact()


def test_progress_counts_up_to_all_vectors():
    seen: list[tuple[int, int]] = []
    index = Index(24)
    index.add(vectors(70_000), progress=lambda done, total: seen.append((done, total)))
    assert [total for _, total in seen] == [70_000] * len(seen)
    assert len(seen) >= 3
    assert seen[-1][0] == 70_000
    assert sorted(seen) == seen


@pytest.mark.parametrize("filled", [0, 10, 900, 3000])
@pytest.mark.parametrize("answer", ["false", "raise"])
def test_a_cancelled_addition_adds_nothing(filled, answer):
    def stop(done: int, total: int) -> bool:
        if done < total:
            return True
        if answer == "raise":
            raise ZeroDivisionError
        return False

    data = vectors(40_000)
    index = Index(24)
    index.add(data[:filled])
    before = index.to_bytes()
    with pytest.raises(CancelledError if answer == "false" else ZeroDivisionError):
        index.add(data[filled:], progress=stop)
    index.validate()
    assert index.to_bytes() == before
    with pytest.raises(CancelledError if answer == "false" else ZeroDivisionError):
        index.add(data[:5], ids=np.arange(5), on_conflict="replace", progress=stop)
    assert index.to_bytes() == before
    # And the index goes on as if nothing had been tried.
    fresh = Index(24)
    fresh.add(data[:filled])
    for part in (data[filled : filled + 70], data[filled + 70 :]):
        assert (index.add(part) == fresh.add(part)).all()
    index.validate()
    assert index.to_bytes() == fresh.to_bytes()


def test_a_callback_that_writes_to_its_own_index_is_refused_not_stuck():
    index, other = Index.build(vectors(10)), Index(24)
    index.add(vectors(5), progress=lambda *_: other.add(vectors(1)) is not None)
    assert len(other) == 1
    for write in (lambda *_: index.remove([1]), lambda *_: index.add(vectors(1)), lambda *_: index.compact()):
        with pytest.raises(RuntimeError, match="same index"):
            index.add(vectors(5), progress=write)
    index.add(vectors(5), progress=lambda *_: len(index) == 15 and 3 in index and index.search(vectors(1)).ids.size > 0)
    assert len(index) == 20


def test_results_are_written_where_the_caller_says():
    index = Index.build(vectors(100))
    expected = index.search(vectors(4, seed=1), 3)
    out = np.empty((4, 3), np.int64), np.empty((4, 3), np.float32)
    found = index.search(vectors(4, seed=1), 3, out=out)
    assert np.shares_memory(found.ids, out[0])
    assert np.shares_memory(found.distances, out[1])
    np.testing.assert_array_equal(out[0], expected.ids)
    np.testing.assert_array_equal(out[1], expected.distances)
    row = np.empty(3, np.int64), np.empty(3, np.float32)
    index.search(vectors(4, seed=1)[2], 3, out=row)
    np.testing.assert_array_equal(row[0], expected.ids[2])
    rows = np.empty((2, 24), np.float32)
    assert np.shares_memory(index.get([5, 7], out=rows), rows)
    np.testing.assert_array_equal(rows, index[[5, 7]])
    for bad in ((out[0].T, out[1]), (out[0][:2], out[1]), (out[0].astype(np.int32), out[1])):
        with pytest.raises((ValueError, TypeError), match=r"out\[0\]"):
            index.search(vectors(4, seed=1), 3, out=bad)
    with pytest.raises(ValueError, match="out"):
        index.get([5], out=rows)


def test_the_default_beam_is_an_attribute():
    index = Index.build(vectors(6000), metric="l2")
    queries = vectors(10, seed=1)
    assert index.beam is None
    narrow = index.search(queries, 10, beam=1)
    index.beam = 1
    np.testing.assert_array_equal(index.search(queries, 10).ids, narrow.ids)
    assert index.snapshot().beam == index.copy().beam == 1
    index.beam = 0
    with pytest.raises(ValueError, match="beam"):
        index.search(queries)


def test_every_float_type_is_read_where_it_lies():
    torch = pytest.importorskip("torch")
    data = vectors(2000).astype(np.float16).astype(np.float32)
    data = torch.from_numpy(data).bfloat16().float().numpy()  # exact in every type
    expected = Index.build(data, metric="l2").search(data[:5], 4)
    tensor = torch.from_numpy(data)
    kinds = [tensor, tensor.bfloat16(), tensor.half(), tensor.double(), tensor.bfloat16().t().contiguous().t()]
    arrays = [data.astype(np.float16), data.astype(np.float64), data.astype(">f4"), np.longdouble(data)]
    for rows in [*kinds, *arrays]:
        found = Index.build(rows, metric="l2").search(rows[:5], 4)
        np.testing.assert_array_equal(found.ids, expected.ids)
        np.testing.assert_allclose(found.distances, expected.distances, rtol=1e-6)
    bad = torch.zeros(2, 24, dtype=torch.bfloat16)
    bad[1, 3] = float("nan")
    with pytest.raises(ValueError, match="row 1"):
        Index(24).add(bad)


def test_an_array_of_another_library_comes_through_dlpack():
    class Exporter:
        """Speaks DLPack and nothing else."""

        def __init__(self, array, device=1):
            self.array, self.device = array, device

        def __dlpack_device__(self):
            return self.device, 0

        def __dlpack__(self, **options):
            return self.array.__dlpack__(**options)

    data = vectors(64)
    found = Index.build(Exporter(data)).search(Exporter(data[:3].copy()), 4)
    np.testing.assert_array_equal(found.ids, Index.build(data).search(data[:3], 4).ids)
    with pytest.raises(TypeError, match="CPU"):
        Index(24).add(Exporter(data, device=2))


def test_the_mean_is_taken_out_once_there_are_enough_vectors():
    data = vectors(2000) + 5
    index = Index(24)
    index.add(data[:1000])
    assert (index.mean == 0).all()
    index.add(data[1000:])
    np.testing.assert_allclose(index.mean, data.mean(0), atol=1e-4)
    np.testing.assert_allclose(index.get(np.arange(2000)), data, atol=1e-5)
    assert (Index.build(data, center=False).mean == 0).all()


def test_recall_counts_what_is_as_close_as_the_truth():
    result = SearchResult(np.array([[1, 2, 5], [3, 4, -1]]), np.array([[0.0, 1, 2], [0, 1, np.inf]], np.float32))
    truth = SearchResult(np.array([[1, 2, 3], [3, 4, -1]]), np.array([[0.0, 1, 2], [0, 1, np.inf]], np.float32))
    assert result.recall(truth) == 1.0  # 5 is as close as 3
    assert result.recall(truth.ids) == pytest.approx(4 / 5)
    assert result.recall(np.full((2, 3), -1)) == 1.0
    with pytest.raises(ValueError, match="shape"):
        result.recall(truth.ids[0])


def test_an_index_is_not_iterable():
    with pytest.raises(TypeError, match="not iterable"):
        iter(Index.build(vectors(3)))


def test_an_id_replaced_over_and_over_is_found_at_once():
    index = Index(8, "l2")
    index.add(np.zeros((5000, 8), np.float32))
    for step in range(600):
        index.add(np.full((1, 8), 1.0 + step, np.float32), ids=[7], on_conflict="replace")
    index.validate()
    assert index.get(7)[0] == 600.0
    assert len(index) == 5000
    assert index.search(np.full(8, 600.0), 1).ids[0] == 7


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("offset", [0.0, 20.0])
def test_a_range_search_finds_all_within_the_radius_and_nothing_else(metric, offset):
    data, queries = vectors(6000) * 2 + offset, vectors(8, seed=1)
    index = Index.build(data, metric=metric)
    index.remove(np.arange(0, 6000, 7))
    alive = np.flatnonzero(np.arange(6000) % 7 != 0)
    truth = brute_force(queries, data[alive], len(alive), metric)
    for rank in (0, 5, 300, len(alive) - 1):
        radius = float(np.median(truth.distances[:, rank]))
        lims, ids, distances = index.range_search(queries, radius)
        assert lims.shape == (9,)
        assert lims[0] == 0
        assert (distances <= radius).all()
        for i in range(8):
            mine = slice(lims[i], lims[i + 1])
            assert (np.diff(distances[mine]) >= 0).all()
            slack = 1e-4 * (1 + abs(radius))
            sure = set(alive[truth.ids[i][truth.distances[i] < radius - slack]].tolist())
            perhaps = set(alive[truth.ids[i][truth.distances[i] <= radius + slack]].tolist())
            assert sure <= set(ids[mine].tolist()) <= perhaps
        few = index.range_search(queries, radius, max_results=4)
        assert (np.diff(few.lims) == np.minimum(np.diff(lims), 4)).all()
        narrow = index.range_search(queries, radius, beam=5, filter=np.arange(6000) < 3000)
        assert (narrow.ids < 3000).all()
        assert set(narrow.query(3).ids.tolist()) <= set(ids[lims[3] : lims[4]].tolist())


def test_a_range_search_of_nothing_is_empty_and_bad_radii_are_refused():
    index = Index.build(vectors(50), metric="l2")
    assert index.range_search(vectors(3), -1.0).lims.tolist() == [0, 0, 0, 0]
    assert index.range_search(np.empty((0, 24)), 1.0).lims.tolist() == [0]
    assert Index(24).range_search(vectors(2), np.inf).ids.size == 0
    assert index.range_search(vectors(1)[0], np.inf).lims.tolist() == [0, 50]
    for bad in (np.nan, "x", None):
        with pytest.raises((ValueError, TypeError), match="radius"):
            index.range_search(vectors(1), bad)
    with pytest.raises(ValueError, match="beam"):
        index.range_search(vectors(1), 1.0, beam=0)


def test_pages_hold_every_vector_once_and_summarise_it():
    data = vectors(3000) + 3
    index = Index.build(data)
    index.remove(np.arange(100))
    pages = index.pages()
    assert pages.ids.shape[1] == index.page_tokens == 16
    assert ((pages.ids >= 0).sum(1) == pages.counts).all()
    assert sorted(pages.ids[pages.ids >= 0].tolist()) == list(range(100, 3000))
    for page in (0, 50, len(pages.counts) - 1):
        rows = data[pages.ids[page][pages.ids[page] >= 0]]
        np.testing.assert_allclose(pages.means[page], rows.mean(0), atol=1e-4)
        spread = np.sqrt(((rows - rows.mean(0)) ** 2).sum(1).mean())
        assert pages.spreads[page] == pytest.approx(spread, rel=1e-3)
    assert Index(8).pages().ids.shape == (0, 16)


@pytest.mark.parametrize("group", [1, 4])
def test_page_search_returns_the_pages_with_the_most_softmax_mass(group):
    data, queries = vectors(5000, 32), vectors(8, 32, seed=1) * 2
    index = Index.build(data).snapshot()
    pages, scores, mass = index.search_pages(queries, 12, group=group, scorer="exact", scaling=0.5)
    assert pages.shape == scores.shape == (8 // group, 12)
    assert mass.shape == (8,)
    ids = index.pages().ids
    weights = np.exp(0.5 * queries @ data.T)
    weights /= weights.sum(1, keepdims=True)
    of_page = np.where(ids >= 0, weights[:, ids], 0).sum(2).reshape(8 // group, group, -1)
    best = np.sort(of_page.mean(1), axis=1)[:, ::-1][:, :12]
    np.testing.assert_allclose(scores, best, rtol=1e-3)
    kept = np.take_along_axis(of_page, pages[:, None, :].astype(np.int64), axis=2).sum(2).reshape(-1)
    np.testing.assert_allclose(mass, kept, rtol=1e-3)
    quick = index.search_pages(queries, 12, group=group, scaling=0.5)
    assert quick.mass.mean() > 0.9 * mass.mean()


def test_page_search_pads_and_refuses():
    index = Index.build(vectors(40))
    one = index.search_pages(vectors(1)[0], 30)
    assert one.pages.shape == (30,)
    assert one.mass == pytest.approx(1.0)
    assert (one.pages >= 0).sum() == (index.pages().counts > 0).sum()
    assert Index(24).search_pages(vectors(2), 3).mass.tolist() == [0, 0]
    for call, message in (
        (lambda: Index(24, "l2").search_pages(vectors(2), 3), "metric"),
        (lambda: index.search_pages(vectors(3), 3, group=2), "group"),
        (lambda: index.search_pages(vectors(3), 3, group=0), "group"),
        (lambda: index.search_pages(vectors(3), -1), "n_pages"),
        (lambda: index.search_pages(vectors(3), 3, scaling=0.0), "scaling"),
        (lambda: index.search_pages(vectors(3), 3, scorer="best"), "scorer"),
        (lambda: index.search_pages(vectors(3) * np.nan, 3), "row 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("call", ["add", "search"])
def test_ctrl_c_ends_a_long_call_and_changes_nothing(call):
    """The signal comes while the core works: one call of either kind takes far longer than the wait for it."""
    import subprocess
    import sys

    code = f"""
import os, signal, threading, time
import numpy as np
from icecache.index import Index
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
rows = np.random.default_rng(0).standard_normal((400_000, 32), dtype=np.float32)
index = Index.build(rows[:20_000], threads=1)
calls = dict(
    add=lambda: index.add(rows, threads=1),
    search=lambda: index.search(rows, 10, exact=True, threads=1),
)
threading.Timer(0.1, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
start = time.monotonic()
try:
    calls[{call!r}]()
except KeyboardInterrupt:
    index.validate()
    assert len(index) == 20_000
    index.add(rows[:10])
    print("interrupted")
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, timeout=120, capture_output=True, text=True)
    assert done.stdout == "interrupted\n"


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("start", [0, 10**12])
def test_an_index_needs_48_bytes_a_vector_beside_the_vectors(metric, start):
    """Of 128 dimensions, with ids that follow each other from anywhere; codes cost 16 of them."""
    data = np.random.default_rng(0).standard_normal((32_768, 128), dtype=np.float32)
    ids = np.arange(start, start + len(data))
    np.random.default_rng(1).shuffle(ids)
    index = Index.build(data, ids, metric=metric)
    assert index.stats()["index_bytes"] <= 48 * len(data)
    assert index.contains(ids).all()
    lean = Index.build(data, ids, metric=metric, codes=False)
    assert lean.stats()["index_bytes"] <= (48 - 16) * len(data)


def test_an_index_without_codes_stays_without(tmp_path):
    data = vectors(6000, dim=64)
    index = Index.build(data, metric="l2", codes=False)
    truth = brute_force(data[:50], data, 10, "l2")
    index.save(tmp_path / "lean.ice")
    for lean in (index, index.copy(), Index.load(tmp_path / "lean.ice"), Index.from_bytes(index.to_bytes())):
        assert not lean.codes
        lean.add(data[:3000] + 1)
        lean.remove(np.arange(6000, 9000))
        assert lean.search(data[:50], 10).recall(truth) >= 0.95
        assert lean.stats()["index_bytes"] < Index.build(data, metric="l2").stats()["index_bytes"]
    assert Index(64).codes


@pytest.mark.parametrize(
    "ids", [np.arange(3000) * 5, np.arange(3000) * 2**50, 2**63 - 1 - np.arange(3000), 7 + np.arange(3000)]
)
def test_ids_may_be_anything_and_come_back(ids):
    """Dense and sparse ones, replaced ones, small ones after large ones."""
    data = vectors(3000, dim=8)
    index = Index.build(data, ids, metric="l2")
    for _ in range(3):
        index.add(data[:700], ids[:700], on_conflict="replace")
    index.remove(ids[::3])
    small = np.setdiff1d(np.arange(20), ids)[:3]
    index.add(data[:3], small)
    index.validate()
    np.testing.assert_array_equal(index.contains(ids), np.arange(3000) % 3 != 0)
    kept = ids[1::3]
    np.testing.assert_allclose(index.get(kept), data[1::3], atol=1e-5)
    assert index.contains(small).all()
    assert index.search(data[4::3][:50], 1, exact=True).ids[:, 0].tolist() == kept[1:51].tolist()


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("dim", [4, 8, 16, 32])
def test_a_stored_vector_finds_itself(metric, dim):
    """By default, and in pages that were thinned or grew one by one."""
    data = vectors(4000, dim=dim)
    index = Index.build(data[:2000], metric=metric)
    for start in range(2000, 4000, 250):
        index.add(data[start : start + 250])
    index.remove(np.arange(0, 4000, 4))
    kept = np.arange(1, 4000, 4)
    assert (index.search(data[kept], 1).ids[:, 0] == kept).mean() >= 0.95
