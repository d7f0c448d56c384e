"""Data sets of the peer benchmark: same seed, same data; the statistics that make them hard; exact neighbours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ann import datasets, text
from ann.truth import exact, recall, scores
from icecache import brute_force


def test_the_same_seed_gives_the_same_vectors_and_another_seed_others():
    for make in (datasets.keys, datasets.mixture):
        first, again, other = (make(600, seed=seed, n_queries=8, n_extra=16) for seed in (3, 3, 4))
        for part in ("base", "extra", "queries"):
            assert np.array_equal(getattr(first, part), getattr(again, part))
        assert not np.array_equal(first.base, other.base)
        assert first.about != other.about


def test_most_keys_are_not_their_own_best_inner_product_and_centring_mends_that():
    base = datasets.keys(6000, n_queries=8, n_extra=8).base
    centred = base - base.mean(0)
    raw, mended = (((rows @ rows.T).argmax(1) == np.arange(6000)).mean() for rows in (base, centred))
    assert raw < 0.5 < 0.7 < mended
    assert np.linalg.norm(base.mean(0)) > 0.5 * np.median(np.linalg.norm(base, axis=1))


def test_queries_of_keys_are_out_of_distribution_and_those_of_the_mixture_are_not():
    distances = {}
    for name, raw in {
        "keys": datasets.keys(2000, n_queries=64),
        "mixture": datasets.mixture(20_000, n_queries=64),
    }.items():
        near = exact(raw.queries, raw.base, "l2", 1)[1].mean()
        inside = exact(raw.extra[:64], raw.base, "l2", 1)[1].mean()
        distances[name] = near / inside
    assert distances["keys"] > 3
    assert 0.8 < distances["mixture"] < 1.25


def test_the_first_component_of_the_mixture_holds_its_zipf_share():
    raw = datasets.mixture(4000, components=10)
    # Squared distances are about 11 within a component (its size squared times 2/1 + 2/2 + ...), 98 more between two.
    sizes = (-scores(raw.base[:400], raw.base, "l2") < 50).mean(1)
    share = 1 / (1 / np.arange(1, 11)).sum()
    assert abs(np.quantile(sizes, 0.85) - share) < 0.05  # a third of the rows lie in the component with a third of them


@pytest.mark.parametrize("metric", ["ip", "l2", "cosine"])
def test_exact_neighbours_agree_with_the_public_brute_force(metric):
    rng = np.random.default_rng(5)
    base, queries = rng.standard_normal((300, 12), np.float32), rng.standard_normal((70, 12), np.float32)
    assert np.array_equal(exact(queries, base, metric, 9)[0], brute_force(queries, base, 9, metric).ids)


def test_recall_counts_each_hit_once_and_accepts_ties():
    base = np.array([[1, 0], [1, 0], [0, 1], [0.5, 0]], np.float32)
    queries = np.array([[1, 0]], np.float32)
    truth = exact(queries, base, "ip", 2)
    for found, share in (([0, 1], 1.0), ([0, 0], 0.5), ([2, 3], 0.0), ([-1, 1], 0.5), ([99, 0], 0.5)):
        assert recall(np.array([found]), truth, queries, base, "ip") == share
    one = (truth[0][:, :1], truth[1][:, :1])
    twin = 1 - int(one[0][0, 0])
    assert recall(np.array([[twin]]), one, queries, base, "ip") == 1.0


def test_a_stored_data_set_comes_back_mapped_with_its_neighbours(tmp_path: Path):
    raw = datasets.keys(256, n_queries=8, n_extra=8)
    datasets.store("keys4k", raw, tmp_path)
    data = datasets.load("keys4k", tmp_path)
    assert isinstance(data.base, np.memmap)
    assert np.array_equal(data.base, raw.base)
    assert np.array_equal(data.truth, exact(raw.queries, raw.base, "ip", 100)[0])
    with pytest.raises(ValueError, match="data set: expected one of"):
        datasets.load("nothing", tmp_path)


def test_sentences_are_plain_words_of_bounded_length():
    document = """Short one. This sentence is long enough to be taken as it stands.
    It has code in it: x = y[0] + {1: 2} and is refused.

    Another paragraph gives another sentence that is taken."""
    assert text.split(document) == [
        "This sentence is long enough to be taken as it stands.",
        "Another paragraph gives another sentence that is taken.",
    ]
