"""Selectors that read whole pages: the tree search, its exact oracle, and random pages as a control."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from icecache import _core
from icecache.select.base import Read, Request, Selector, Services


@dataclass(frozen=True, slots=True)
class TreeSearch:
    """The index's own search; with `exact`, every page is scored exactly: the best any page index could do."""

    exact: bool = False

    def read(self, services: Services, request: Request) -> Read:
        """Read the pages with the most attention mass, summed over the query group."""
        with services.recorder.part("search"):
            selection = _core.search(
                services.pool,
                request.forests,
                request.queries,
                request.n_pages,
                scaling=request.scaling,
                softcap=request.softcap,
                candidates=services.candidates,
                exact=self.exact,
                estimate_unread=request.estimates,
            )
        return services.read(request, selection)


@dataclass(frozen=True, slots=True)
class RandomPages:
    """Pages drawn uniformly: shows what the budget alone is worth. The draw depends on seed, layer and length only."""

    seed: int

    def read(self, services: Services, request: Request) -> Read:
        """Read `n_pages` different random pages per KV head."""
        with services.recorder.part("search"):
            seeds = [_draw_seed(self.seed, request.layer, len(forest)) for forest in request.forests]
            selection = _core.random_pages(request.forests, request.n_pages, seeds)
        read = services.read(request, selection)
        return replace(read, lse=None)  # nobody computed what the others would have held


def _draw_seed(seed: int, layer: int, n_tokens: int) -> int:
    """64 bits that depend on all three."""
    return int(np.random.SeedSequence([seed, layer, n_tokens]).generate_state(1, np.uint64)[0])


def chooses_pages(selector: Selector | None) -> bool:
    """Whether a selector chooses pages of its request's forests, so that other layers can read the same ones."""
    return isinstance(selector, TreeSearch | RandomPages)
