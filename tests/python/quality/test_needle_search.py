"""One key holds all the attention, and the mean of its page says nothing of it."""

from __future__ import annotations

import numpy as np
import pytest
from icecache import IceConfig, _core

CHUNKS, CHUNK, DIM = 24, 1024, 32
SCALING = DIM**-0.5


def haystack(place: int) -> tuple[_core.Forest, np.ndarray, np.ndarray]:
    """24k keys that point a little along the query, but for those around the needle; a query group of one; the keys."""
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
    return forest, query, keys[0]


def pages_with_better_means(forest: _core.Forest, query: np.ndarray, keys: np.ndarray, place: int) -> int:
    """Pages that mean and radius put before the one that holds `place`."""
    positions = np.asarray(_core.all_pages([forest]).positions())[0, 0]
    pages = keys[positions]
    means = pages.mean(1)
    radii = np.linalg.norm(pages - means[:, None], axis=2).max(1)
    ranks = means @ query[0, 0, 0] + 0.25 * np.linalg.norm(query) * radii
    return int((ranks > ranks[(positions == place).any(1)]).sum())


@pytest.mark.parametrize("budget", [64, 256])
def test_the_default_search_finds_a_key_that_its_page_hides(budget):
    config = IceConfig(budget=budget)
    place = 5 * CHUNK + 123
    forest, query, keys = haystack(place)
    assert pages_with_better_means(forest, query, keys, place) > 1024, "a haystack that hides nothing"
    found = _core.search(
        _core.Pool(1), [forest], query, config.retrieved_pages, scaling=SCALING, candidates=config.candidates
    )
    lse = np.asarray(found.lse, np.float64)[0, 0, 0]
    assert np.exp(lse[1] - lse[0]) > 0.99
