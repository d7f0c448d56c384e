"""A page choice that nobody makes: what a decode step costs without the search."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from icecache.attention import DeviceStep, StepShape
from icecache.config import PAGE_TOKENS
from icecache.pages import LayerPages

_POOL_BYTES = 1 << 30
"""Pinned pages to choose from: far more than any cache of the device holds."""


class FixedPages:
    """Reads the same random pages of pinned memory in every step.

    Parameters
    ----------
    seed : int
        Of the choice.
    """

    waits, estimates = False, False

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._pool: torch.Tensor | None = None
        self._filled: set[int] = set()

    def mailbox(self, shape: StepShape) -> None:
        """Pin the pages to choose from; nobody is asked."""
        page = PAGE_TOKENS * (shape.key_dim + max(shape.row_dim(group) for group in range(shape.n_searches)))
        n_pages = _POOL_BYTES // (page * shape.dtype.itemsize)
        self._pool = torch.empty(n_pages, page, dtype=shape.dtype, pin_memory=True)
        self._pool[:64].normal_(generator=self._generator)
        self._pool[64:] = self._pool[:64].repeat(n_pages // 64, 1)[: n_pages - 64]

    def load(self, shape: StepShape, needed: int, n_pages: int, softcap: float | None) -> None:
        """Nothing to do."""

    def prepare(self, step: DeviceStep, pages: Sequence[LayerPages], n_pages: int) -> None:
        """Nothing to do."""

    def begin(self, step: DeviceStep, pages: Sequence[LayerPages], n_pages: int) -> int:  # noqa: ARG002
        """Fill the table once with `n_pages` full pages a head."""
        if id(step) not in self._filled:
            assert self._pool is not None
            self._filled.add(id(step))
            picks = torch.randint(len(self._pool), (*step.table.shape[:3], n_pages), generator=self._generator)
            address = self._pool.data_ptr() + picks * self._pool[0].numel() * self._pool.element_size()
            step.table[..., :n_pages] = ((0xFFFF << 48) | address).to(step.table.device)
        return 1

    def end(self, step: DeviceStep) -> None:
        """Nothing can go wrong."""

    def beside(self, step: DeviceStep, pages: Sequence[LayerPages], *, handed: bool) -> None:
        """Nothing to do."""

    def account(self) -> None:
        """Nothing is counted."""

    def close(self) -> None:
        """Free the pages."""
        self._pool = None
