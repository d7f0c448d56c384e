"""IceCache as published: M-DCI with the authors' settings chooses pages; what our own index is compared with.

The index is the profile ``paper`` of the core, made from the publication's description and checked against measurements
of the public code (yuzhenmao/IceCache); the rules of a step are those of its ``infer_state.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from icecache import _core
from icecache.config import PAGE_TOKENS
from icecache.errors import ConfigError
from icecache.index.pool import shared_pool
from icecache.pages import RowIndex
from icecache.select import Baseline, Chosen, StepView


@dataclass(slots=True)
class PaperTrees:
    """Trees of one layer, one forest per row; made when a step first needs them.

    Invariant: the forest of a row holds tokens ``sink .. sink + len(forest)``, the first `built` of them from a bulk
    build, the others inserted in order. So a copy can be made again from the keys, and is the same.
    """

    built: list[int]
    forests: list[_core.PaperForest | None]
    store: _core.PageStore | None = field(default=None)

    def select(self, rows: Sequence[int]) -> PaperTrees:
        """Copy of these rows, without trees yet."""
        return PaperTrees([self.built[b] for b in rows], [None] * len(rows))

    def follow(self, pool: _core.Pool, keys: torch.Tensor, sink: int, counts: Sequence[int]) -> None:
        """Make every forest hold `counts` tokens of keys (B, H, T, D) from column `sink` on."""
        n_heads, dim = keys.shape[1], keys.shape[3]
        if self.store is None:
            self.store = _core.PageStore(dim, 0, "float32")
        for b, n in enumerate(counts):
            forest = self.forests[b]
            if forest is None or len(forest) > n:
                forest = self.forests[b] = _core.PaperForest(self.store, n_heads)
            held = len(forest)
            for start, stop in ((held, min(self.built[b], n)), (max(held, self.built[b]), n)):
                if start < stop:
                    new = keys[b, :, sink + start : sink + stop].float().cpu().contiguous().numpy()
                    forest.extend(pool, new.view(np.uint8))


@dataclass(frozen=True, slots=True)
class IceCachePaper(Baseline):
    """Sink, window, and per KV head the pages that M-DCI finds: one search per query head, lists interleaved.

    The authors' settings: field of view ``max(30, 0.0015 n)``, 0.8 of the children scored (``prop_to_retrieve``), pages
    of 16 tokens that are neighbours in the index (about 14.5 live). Tokens enter the index 16 at a time when they leave
    the window, as in our runtime, so that the two differ in the index alone. A context that fits the budget is read
    whole. Published with 2 sink and at least 2 window pages inside the budget, and layers 0 and 1 dense.

    Parameters
    ----------
    budget : int
        Tokens per KV head, sink and window included, the newest token and up to 15 that wait for the index not.
    sink, window : int
        First and last tokens that are always attended.
    threads : int or None, default=None
        As in :class:`icecache.IceConfig`.

    Raises
    ------
    ConfigError
        If no page fits into the budget.
    """

    budget: int
    sink: int = 16
    window: int = 32
    threads: int | None = None

    def __post_init__(self) -> None:
        if self._n_pages < 1:
            msg = f"budget must hold sink, window and a page of {PAGE_TOKENS} tokens, got {self.budget!r}"
            raise ConfigError(msg)

    @property
    def name(self) -> str:
        """``icecache-paper``."""
        return "icecache-paper"

    @property
    def _n_pages(self) -> int:
        return (self.budget - self.sink - self.window) // PAGE_TOKENS

    def prepare_index(self, lengths: Sequence[int]) -> RowIndex:
        """Trees for prompts of these lengths."""
        built = [max(n - self.sink - self.window, 0) for n in lengths]
        return PaperTrees(built, [None] * len(built))

    def choose(self, view: StepView) -> Chosen:
        """Attend to sink, window, what waits for the index, and the pages it finds."""
        trees = view.index
        assert isinstance(trees, PaperTrees)
        counts = self._indexed(view, trees)
        pool = shared_pool(self.threads)
        trees.follow(pool, view.keys, self.sink, counts)
        indexed = torch.tensor(counts, device=view.keys.device)[:, None]
        far = (view.columns >= self.sink) & (view.columns < self.sink + indexed)
        whole = indexed <= self._n_pages * PAGE_TOKENS
        mask = (view.valid & (~far | whole))[:, None].expand(-1, view.keys.shape[1], -1)
        forests = [forest for forest in trees.forests if forest is not None]
        queries = view.query.cpu().contiguous().numpy()  # sync: the search runs on the host
        found = torch.from_numpy(_core.paper_search(pool, forests, queries, self._n_pages)).to(view.keys.device).long()
        # Column T takes what is not there.
        columns = torch.where(found >= 0, found + self.sink, view.keys.shape[2])
        wider = torch.zeros(*mask.shape[:2], view.keys.shape[2] + 1, dtype=torch.bool, device=mask.device)
        chosen = wider.scatter(2, columns, value=True)[..., :-1]
        return Chosen((mask | chosen)[:, :, None])

    def _indexed(self, view: StepView, trees: PaperTrees) -> list[int]:
        """Tokens of each row that are in the index at this step: the prompt's, and every 16 that left the window."""
        counts = []
        for n, built in zip(view.lengths.tolist(), trees.built, strict=True):  # sync: the trees are on the host
            over = n - 1 - self.sink - self.window - built
            counts.append(max(built + over // PAGE_TOKENS * PAGE_TOKENS, 0) if over >= 0 else max(built + over, 0))
        return counts
