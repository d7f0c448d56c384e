"""One key holds all the attention, and the mean of its page says nothing of it."""

from __future__ import annotations

import numpy as np
import pytest
from icecache import IceConfig, _core

CHUNKS, CHUNK, DIM = 16, 1024, 32
SCALING = DIM**-0.5


def haystack(place: int) -> tuple[_core.Forest, np.ndarray]:
    """16k keys that point a little along the query, but for those around the needle; and a query group of one."""
    rng = np.random.default_rng(3)
    keys = rng.normal(0, 0.6, (CHUNKS, CHUNK, DIM)).astype(np.float32)
    keys[..., 0] = 3.0
    chunk, token = divmod(place, CHUNK)
    keys[chunk, :, 0] = -2.0
    keys[chunk, token] = 0.0
    keys[chunk, token, 0] = 12.0
    keys = keys.reshape(1, -1, DIM)
    forest = _core.Forest(_core.PageStore(DIM, 0, "float32"), 1)
    _core.extend(_core.Pool(1), [forest], [keys.view(np.uint8)], [np.empty((1, CHUNKS * CHUNK, 0), np.uint8)])
    query = np.zeros((1, 1, 1, DIM), np.float32)
    query[..., 0] = 2.0 / SCALING
    assert np.exp((keys[0] - keys[0, place]) @ query[0, 0, 0] * SCALING).sum() < 1.01
    return forest, query


def mass_found(forest: _core.Forest, query: np.ndarray, n_pages: int, candidates: int) -> float:
    found = _core.search(_core.Pool(1), [forest], query, n_pages, scaling=SCALING, candidates=candidates)
    lse = np.asarray(found.lse, np.float64)[0, 0, 0]
    return float(np.exp(lse[1] - lse[0]))


@pytest.mark.parametrize("budget", [64, 256])
def test_the_default_search_finds_a_key_that_its_page_hides(budget):
    config = IceConfig(budget=budget)
    forest, query = haystack(place=5 * CHUNK + 123)
    assert mass_found(forest, query, config.retrieved_pages, config.candidates) > 0.99
    assert mass_found(forest, query, config.retrieved_pages, 24 * 13) < 0.5, "a haystack that hides nothing"
