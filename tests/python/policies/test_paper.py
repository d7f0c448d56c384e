"""The published index as a policy: the best token of every query head is found, in the prompt and among new tokens."""

from __future__ import annotations

import numpy as np
import pytest
from icecache import _core
from icecache.errors import ConfigError
from icecache.policies import IceCachePaper
from policy_driver import PromptRow, drive, stub_services

SINK, WINDOW, BUDGET = 16, 32, 128


class Near:
    """Not all that is attended, but what must be: sink, window, and what waits for the index."""

    def __init__(self, prompt: PromptRow) -> None:
        self.built = max(prompt.keys.shape[1] - SINK - WINDOW, 0)

    def indexed(self, n):
        return self.built + max(n - 1 - SINK - WINDOW - self.built, 0) // 16 * 16

    def step(self, keys, query):
        n = keys.shape[1]
        indexed, mask = self.indexed(n), np.zeros((*query.shape[:2], n), bool)
        mask[..., :SINK] = mask[..., SINK + indexed :] = True
        return mask | (indexed <= BUDGET - SINK - WINDOW)


class Best(Near):
    """The best indexed token of each query head, for its whole KV head."""

    def step(self, keys, query):
        indexed, mask = self.indexed(keys.shape[1]), np.zeros((*query.shape[:2], keys.shape[1]), bool)
        for h, heads in enumerate(query):
            for q in heads if indexed else ():
                mask[h, :, SINK + np.argmax(keys[h, SINK : SINK + indexed] @ q)] = True
        return mask


@pytest.mark.parametrize("kind", ["gauss", "topics"])
@pytest.mark.parametrize("group", [1, 4])
def test_it_attends_to_its_window_and_to_the_best_tokens_of_the_queries(kind, group):
    services = stub_services()
    policy = IceCachePaper(BUDGET, SINK, WINDOW, threads=1)
    options = {"group": group, "kind": kind, "lengths": (600, 300, 60), "n_steps": 40, "services": services}
    attended, hits = [], []
    for step in drive(policy, Near, **options):
        assert step.got[step.expected].all()
        assert (step.got == step.got[:, :1]).all()
        attended.append(step.got.sum(-1).max())
    # Sink, window, newest, 15 that wait, and 5 pages that are at least half full.
    assert BUDGET - 5 * 8 < max(attended) <= BUDGET + 16
    assert services.charges.totals().attended_max == max(attended)
    for step in drive(policy, Best, **options):
        hits += step.got[step.expected].tolist()
    assert np.mean(hits) > 0.95  # 0.8 of the children are scored, nearest by projection first


def test_a_copy_is_made_again_and_chooses_the_same():
    rng = np.random.default_rng(0)
    keys = rng.standard_normal((2, 500, 16)).astype(np.float32)
    queries = rng.standard_normal((1, 2, 4, 16)).astype(np.float32)
    pool, found = _core.Pool(1), []
    for cuts in ((300, 301, 500), (300, 400, 450, 500)):
        forest = _core.PaperForest(_core.PageStore(16, 0, "float32"), 2)
        for start, stop in zip((0, *cuts), cuts, strict=False):
            forest.extend(pool, keys[:, start:stop].copy().view(np.uint8))
        assert len(forest) == 500
        found.append(_core.paper_search(pool, [forest], queries, 6))
    np.testing.assert_array_equal(*found)
    for tokens in found[0][0]:
        live = tokens[tokens >= 0]
        assert len(set(live.tolist())) == len(live) > 6 * 6


def test_bad_arguments_are_refused():
    pool, store = _core.Pool(1), _core.PageStore(16, 0, "float32")
    forest = _core.PaperForest(store, 2)
    query = np.zeros((1, 2, 4, 16), np.float32)
    with pytest.raises(ValueError, match="value_dim 0, got 8"):
        _core.PaperForest(_core.PageStore(16, 8, "float32"), 2)
    with pytest.raises(ValueError, match="n_kv_heads"):
        _core.PaperForest(store, 0)
    with pytest.raises(ValueError, match="keys: expected shape"):
        forest.extend(pool, np.zeros((3, 4, 64), np.uint8))
    with pytest.raises(ValueError, match="at least one"):
        _core.paper_search(pool, [], query, 4)
    with pytest.raises(ValueError, match="queries: expected shape"):
        _core.paper_search(pool, [forest], query[:, :1], 4)
    with pytest.raises(ValueError, match="finite"):
        forest.extend(pool, np.full((2, 4, 16), np.nan, np.float32).view(np.uint8))
    assert (_core.paper_search(pool, [forest], query, 4) == -1).all()
    assert len(forest) == 0
    with pytest.raises(ConfigError, match="budget must hold"):
        IceCachePaper(48)
