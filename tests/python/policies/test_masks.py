"""Every policy attends to what its slow reference attends to: ragged rows, groups of 1 and 4, 30 decode steps."""

from __future__ import annotations

from functools import partial

import numpy as np
import policy_references as reference
import pytest
from icecache.policies import Quest, SnapKV, TokenOracle
from policy_driver import drive, stub_services

CASES = {
    "quest": (Quest(64), partial(reference.Quest, budget=64)),
    "quest of few pages": (Quest(16), partial(reference.Quest, budget=16)),
    "snapkv": (
        SnapKV(64, window=16),
        partial(reference.SnapKV, budget=64, window=16, kernel=7, pool="max", per_query=True),
    ),
    "snapkv, average": (
        SnapKV(48, window=32, kernel=5, pool="avg"),
        partial(reference.SnapKV, budget=48, window=32, kernel=5, pool="avg", per_query=True),
    ),
    "snapkv per KV head": (
        SnapKV(64, window=16, unit="kv"),
        partial(reference.SnapKV, budget=64, window=16, kernel=7, pool="max", per_query=False),
    ),
    "token-oracle": (
        TokenOracle(48, 4, 16),
        partial(reference.TokenOracle, budget=48, sink=4, window=16, per_query=False),
    ),
    "token-oracle-q": (
        TokenOracle(48, 4, 16, "query"),
        partial(reference.TokenOracle, budget=48, sink=4, window=16, per_query=True),
    ),
}


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("kind", ["gauss", "topics"])
@pytest.mark.parametrize("case", CASES)
def test_a_policy_attends_to_what_its_reference_attends_to(case, kind, group):
    policy, slow = CASES[case]
    services = stub_services()
    attended, loaded = [], []
    for step in drive(policy, slow, group=group, kind=kind, services=services):
        np.testing.assert_array_equal(step.got, step.expected)
        np.testing.assert_allclose(step.out, step.expected_out, rtol=2e-5, atol=2e-5)
        attended.append(step.expected.sum(-1))
        loaded.append(step.expected.any(1).sum(-1))
    charged = services.charges.totals()
    assert charged.attended_sum == np.sum(attended)
    assert charged.loaded_sum == np.sum(loaded)
    assert (charged.n_queries, charged.n_heads) == (np.size(attended), np.size(loaded))
    assert (charged.attended_min, charged.attended_max) == (np.min(attended), np.max(attended))
