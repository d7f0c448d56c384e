"""Intervals are those of all resamples, cover what they promise, and never shrink to nothing."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from icecache.eval import stats


def test_resampled_means_are_those_of_all_resamples():
    # Four pairs of distinct differences: all 4^4 resamples against ours.
    values = np.array([-1.0, 0.0, 0.25, 1.0])
    every = np.array([np.mean(values[list(pick)]) for pick in itertools.product(range(4), repeat=4)])
    few = stats._resampled_means(values[:, None], np.random.default_rng(0), 40_000)[:, 0]
    many = stats._resampled_means(
        np.concatenate([values, np.linspace(0, 1, 40)])[:, None], np.random.default_rng(0), 500
    )
    assert many.shape == (500, 1)
    for q in (2.5, 25, 50, 75, 97.5):
        assert np.percentile(few, q) == pytest.approx(np.percentile(every, q), abs=0.07)
    assert few.std() == pytest.approx(every.std(), rel=0.02)


def test_the_count_shortcut_draws_as_indices_do(monkeypatch):
    rng = np.random.default_rng(3)
    values = rng.integers(0, 2, (60, 1)).astype(float)
    fast = stats._resampled_means(values, np.random.default_rng(1), 4000)
    unique = values + rng.uniform(0, 1e-9, values.shape)
    slow = stats._resampled_means(unique, np.random.default_rng(1), 4000)
    assert fast.mean() == pytest.approx(slow.mean(), abs=0.01)
    assert fast.std() == pytest.approx(slow.std(), rel=0.08)


@pytest.mark.parametrize(
    ("tasks", "n", "lost", "won"), [(1, 60, 0.2, 0.1), (7, 64, 0.01, 0.0), (7, 64, 0.03, 0.01), (3, 40, 0.0, 0.0)]
)
def test_the_interval_covers_the_true_difference(tasks, n, lost, won):
    rng = np.random.default_rng(5)
    covered = below = 0
    for repeat in range(200):
        draw = rng.random((tasks, n))
        difference = np.where(draw < lost, -1.0, np.where(draw > 1 - won, 1.0, 0.0))
        first = np.where(difference < 0, 1.0, 0.0)
        found = stats.macro_difference(list(first), list(first + difference), seed=repeat, resamples=400)
        covered += found.low <= won - lost <= found.high
        below += found.low <= won - lost
    # .95 and .975 promised; 200 runs at the promise stay above with probability .99.
    assert covered >= 182
    assert below >= 189


def test_tasks_count_alike_whatever_their_size():
    first = [np.ones(10), np.ones(1000)]
    second = [np.zeros(10), np.ones(1000)]
    assert stats.macro_difference(first, second).estimate == -0.5
    assert stats.macro_ratio(first, second).estimate == 0.5
    assert stats.macro_difference(second, first).estimate == 0.5


def test_samples_are_resampled_in_pairs():
    # Two arms that differ by exactly one tenth everywhere: pairing leaves no doubt, apart the scores vary widely.
    first = np.random.default_rng(2).uniform(0, 0.9, 400)
    found = stats.macro_difference([first], [first + 0.1])
    assert found.high - found.low < 0.03
    apart = stats.mean_interval([first])
    assert apart.high - apart.low > 0.04


def test_no_difference_seen_still_leaves_what_the_number_of_samples_leaves():
    ones = np.ones(100)
    found = stats.macro_difference([ones], [ones])
    assert found.estimate == 0
    assert found.low == pytest.approx(-0.0392, abs=1e-3)
    assert stats.resolution(ones, ones) == pytest.approx(0.0392, abs=1e-3)
    assert stats.macro_ratio([ones * 0.5], [ones * 0.5]).low < 0.95
    assert stats.resolution([1.0], [0.0]) == 1.0


def test_resolution_is_the_interval_of_no_difference():
    # 4 % discordant of 500: 1.96 standard errors and the unseen pairs, 1.9 points.
    first, second = np.ones(500), np.ones(500)
    second[:20] = 0
    assert stats.resolution(first, second) == pytest.approx(1.96 * math.sqrt(24) / 500, rel=1e-3)
    assert stats.macro_resolution([first] * 4, [second] * 4) < stats.resolution(first, second)


def test_ratio_has_no_value_where_full_attention_has_none():
    assert math.isnan(stats.macro_ratio([np.zeros(5)], [np.ones(5)]).estimate)


def test_mcnemar_counts_and_its_chance_are_those_of_all_coin_flips():
    first = [1, 1, 1, 1, 1, 0, 1, 0]
    second = [0, 0, 0, 0, 1, 1, 1, 0]
    found = stats.mcnemar(first, second)
    assert (found.only_first, found.only_second) == (4, 1)
    flips = [sum(flip) for flip in itertools.product((0, 1), repeat=5)]
    assert found.p_value == pytest.approx(np.mean([abs(heads - 2.5) >= 1.5 for heads in flips]))
    assert stats.mcnemar([1.0], [1.0]).p_value == 1.0
    assert 0 < stats.binomial_p(900, 1100) < 1e-4


def test_mcnemar_agrees_with_scipy():
    scipy_stats = pytest.importorskip("scipy.stats")
    for one, two in [(0, 0), (3, 9), (10, 10), (40, 17)]:
        expected = scipy_stats.binomtest(one, one + two).pvalue if one + two else 1.0
        assert stats.binomial_p(one, two) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("first", "second"), [([], []), ([1.0], [1.0, 0.0]), ([[1.0]], [[1.0]])])
def test_what_cannot_be_paired_is_refused(first, second):
    with pytest.raises(ValueError, match="equally long"):
        stats.mcnemar(first, second)
    with pytest.raises(ValueError, match="at least one"):
        stats.macro_difference([], [])
