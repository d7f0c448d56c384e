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
            )
        return services.read(request, selection)


@dataclass(frozen=True, slots=True)
class RandomPages:
    """Pages drawn uniformly: shows what the budget alone is worth. The draw depends on seed, layer and length only."""

    seed: int

    def read(self, services: Services, request: Request) -> Read:
        """Read `n_pages` different random pages per KV head."""
        with services.recorder.part("search"):
            pages = np.array(_core.all_pages(request.forests).pages)
            for r, forest in enumerate(request.forests):
                rng = np.random.default_rng([self.seed, request.layer, len(forest)])
                for h in range(forest.n_kv_heads):
                    live = pages[r, h][pages[r, h] >= 0]
                    pages[r, h] = -1
                    drawn = rng.permutation(live)[: request.n_pages]
                    pages[r, h, : len(drawn)] = drawn
            selection = _core.select_pages(request.forests, np.ascontiguousarray(pages[:, :, : request.n_pages]))
        read = services.read(request, selection)
        return replace(read, lse=None)  # nobody computed what the others would have held


def chooses_pages(selector: Selector | None) -> bool:
    """Whether a selector chooses pages of its request's forests, so that other layers can read the same ones."""
    return isinstance(selector, TreeSearch | RandomPages)
