"""Every policy attends to what its slow reference attends to: ragged rows, groups of 1 and 4, 30 decode steps."""

from __future__ import annotations

from functools import partial

import numpy as np
import policy_references as reference
import pytest
import torch
from icecache.policies import (
    H2O,
    ArkVale,
    MagicPIG,
    OmniKV,
    OracleSampling,
    PositionalPageOracle,
    PQCache,
    Quest,
    RenumberedStreaming,
    SnapKV,
    TokenOracle,
)
from icecache.select import StepView
from policy_driver import drive, stub_services

FREQUENCIES = [1.0, 0.3, 0.1, 0.03, 0.01, 0.003]  # the last 4 of 16 channels are not turned
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
    "h2o": (H2O(48), partial(reference.H2O, budget=48)),
    "h2o of an odd budget": (H2O(21), partial(reference.H2O, budget=21)),
    "arkvale": (ArkVale(64), partial(reference.ArkVale, budget=64, page=16, sink=1, window=2)),
    "arkvale of small pages": (
        ArkVale(64, page_tokens=8, sink_pages=2),
        partial(reference.ArkVale, budget=64, page=8, sink=2, window=2),
    ),
    "pqcache": (
        PQCache(40, sink=8, bits=3, iterations=4),
        partial(reference.PQCache, budget=40, sink=8, parts=2, bits=3, iterations=4),
    ),
    "pqcache of more centroids than tokens": (
        PQCache(30, sink=6, parts=4, bits=6, iterations=2),
        partial(reference.PQCache, budget=30, sink=6, parts=4, bits=6, iterations=2),
    ),
    "magicpig": (
        MagicPIG(32, sink=2, local=8, tables=(5, 12)),
        partial(reference.MagicPIG, sink=2, local=8, bits=5, tables=12),
    ),
    "page-oracle-positional": (
        PositionalPageOracle(64, 4, 20, 8),
        partial(reference.PositionalPageOracle, budget=64, sink=4, window=20, page=8),
    ),
    "streaming-renumbered": (
        RenumberedStreaming(40, FREQUENCIES),
        partial(reference.RenumberedStreaming, budget=40, sink=4, frequencies=FREQUENCIES),
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


def views(n_layers, n_prompt, n_tokens, group=4, seed=0):
    """One step of every layer: the same tokens, other keys and queries."""
    generator, shared = torch.Generator().manual_seed(seed), {}
    for layer in range(n_layers):
        keys = torch.randn(2, 2, n_tokens, 16, generator=generator)
        query = torch.randn(2, 2, group, 16, generator=generator)
        lengths, prompts = torch.tensor([n_tokens, n_tokens - 9]), torch.tensor([n_prompt, n_prompt - 9])
        yield StepView(layer, n_layers, query, keys, lengths, prompts, {}, None, shared, 0.3, None)


@pytest.mark.parametrize(
    ("policy", "n_layers", "filters", "dense"),
    [
        (OmniKV(12), 32, (2, 8, 18), (0, 1, 2, 3, 8, 9, 18, 19)),
        (OmniKV(12), 4, (1,), (0, 1)),
        (OmniKV(12, filters=(0, 3), wait=1), 6, (0, 3), (0, 1, 3, 4)),
    ],
)
def test_omnikv_hands_the_choice_of_a_filter_to_the_layers_behind_it(policy, n_layers, filters, dense):
    assert policy.own_dense_layers(n_layers) == dense
    wanted = None
    for view in views(n_layers, 60, 66):
        chosen = policy.choose(view)
        mask = chosen.mask.expand(2, 2, 4, 66)
        if view.layer in filters:
            wanted = np.zeros((2, 66), bool)
            for row, n in enumerate((60, 51)):
                logits = torch.einsum("hgd,htd->hgt", view.query[row].double(), view.keys[row, :, :n].double())
                wanted[row, logits.amax((0, 1)).argsort(descending=True)[:12]] = True
                wanted[row, n : n + 6] = True
        if view.layer in dense:
            assert chosen.dense
            assert torch.equal(mask, view.valid[:, None, None].expand(mask.shape))
        else:
            assert not chosen.dense
            np.testing.assert_array_equal(mask, np.broadcast_to(wanted[:, None, None], mask.shape))


def test_omnikv_chooses_in_the_first_layer_it_has_when_its_filters_are_dense_anyhow():
    policy = OmniKV(12, filters=(0,), wait=0)
    for n_tokens in (66, 67):
        seen = [policy.choose(view).dense for view in views(4, 60, n_tokens) if view.layer > 0]
        assert seen == [True, False, False]


def test_oracle_sampling_draws_from_the_softmax_and_is_unbiased():
    (view,) = views(1, 60, 66)
    true = torch.softmax(view.logits, -1)
    drawn = [OracleSampling(200, seed).choose(view) for seed in range(60)]
    for chosen in drawn:
        assert torch.equal(chosen.mask, chosen.weights > 0)
        torch.testing.assert_close(chosen.weights.sum(-1), torch.ones(2, 2, 4))
        assert not (chosen.weights * 200).frac().gt(1e-3).logical_and((chosen.weights * 200).frac().lt(0.999)).any()
    mean = torch.stack([chosen.weights for chosen in drawn]).mean(0)
    sigma = (true * (1 - true) / 12000).sqrt()
    assert ((mean - true).abs() <= 5 * sigma + 1e-6).all()
    assert torch.equal(drawn[0].weights, OracleSampling(200, 0).choose(view).weights)
    assert not torch.equal(drawn[0].weights, drawn[1].weights)


class Everything:
    def __init__(self, _):
        pass

    def step(self, keys, query):
        return np.ones((*query.shape[:2], keys.shape[1]), bool)


@pytest.mark.parametrize("budget", [32, 64])
def test_magicpig_tunes_its_tables_to_attend_to_the_budget_on_average(budget):
    services = stub_services()
    policy = MagicPIG(budget, sink=2, local=4)
    lengths = (900, 900)
    for _ in drive(policy, Everything, group=4, lengths=lengths, n_steps=10, services=services, kind="topics"):
        pass
    charged = services.charges.totals()
    mean = (charged.attended_sum - charged.generated_sum) / charged.n_queries
    assert 0.6 * budget < mean < 1.6 * budget
