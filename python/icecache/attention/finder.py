"""Page summaries of all layers on the device, and the search among them: everything a captured step launches.

Dimension key: S searches (groups of layers), B rows, H KV heads, G query heads per KV head, D key dim, U = B * H units
of a search, N slots of a unit, C candidates, K places of the page table.

Two stages. Every page is estimated from one or two bits per element of its keys; the best C are scored from the keys
themselves, read where they lie, and the best of those are read by attention.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from icecache.attention.device import StepShape

MIN_CANDIDATES = 48
"""Fewest pages scored from their keys. With two bits 48 of 1000 pages lose as little of the attention mass as 312 do
that are ranked by their means (13 read; benches/results/summaries-16k.txt)."""


def n_candidates(n_pages: int) -> int:
    """Pages scored from their keys when `n_pages` are read: also all pages of a row that is read whole."""
    return max(MIN_CANDIDATES, 2 * n_pages + 16)


@dataclass(frozen=True, slots=True)
class FinderShape:
    """What a finder is built for, beside the step.

    Parameters
    ----------
    n_slots : int
        Slots of a unit.
    planes : int
        Bits per element of a key, 1 or 2.
    n_pages : int
        Pages to choose.
    """

    n_slots: int
    planes: int
    n_pages: int

    def nbytes(self, step: StepShape) -> int:
        """Bytes on the device."""
        from icecache.kernels.page_codes import slot_bytes

        units = step.n_rows * step.n_kv_heads
        scratch = units * (step.group * (4 * self.n_slots + 8 * (self.n_slots // 64 + 1)))
        return step.n_searches * units * self.n_slots * slot_bytes(self.planes, step.key_dim) + scratch


class PageFinder:
    """Chooses the pages of a step on the device.

    Parameters
    ----------
    step : StepShape
    shape : FinderShape

    Raises
    ------
    torch.OutOfMemoryError
        If the device has no room.
    """

    def __init__(self, step: StepShape, shape: FinderShape) -> None:
        from icecache.kernels.page_codes import empty_codes, rotation_matrix
        from icecache.kernels.page_scan import n_parts
        from icecache.kernels.page_select import select_scratch

        self.step, self.shape = step, shape
        searches, rows, heads, group, dim = step.n_searches, step.n_rows, step.n_kv_heads, step.group, step.key_dim
        units, candidates = rows * heads, n_candidates(shape.n_pages)
        device = step.device
        ints = functools.partial(torch.zeros, dtype=torch.int32, device=device)
        floats = functools.partial(torch.zeros, dtype=torch.float32, device=device)
        pinned = device.type == "cuda"
        # Not in inference mode: in-place writes from outside of it would be refused.
        with torch.inference_mode(mode=False):
            self.codes = empty_codes(searches * units * shape.n_slots, shape.planes, dim, device)
            self._rotation = rotation_matrix(dim, device)
            self._like = torch.zeros(1, dtype=step.dtype, device=device)
            self._extents, self._whole = ints(searches, units), ints(searches, units)
            self._unit = torch.zeros(rows, heads, group, dim, dtype=torch.float16, device=device)
            self._length = floats(rows, heads, group)
            self._logits = floats(units, group, shape.n_slots)
            self._parts = floats(units, n_parts(shape.n_slots), group, 2)
            self._scratch = ints(select_scratch(units, shape.n_slots, candidates))
            self._chosen, self._counts = ints(units, candidates), ints(units)
            self._lse, self._exact = floats(units, group), floats(units, candidates, group)
            self.host_table = torch.zeros(searches, rows, heads, step.n_pages, dtype=torch.int64, pin_memory=pinned)
            """Page words of the last step, as the table on the device; ready when the step is."""
            self.host_lse = torch.zeros(searches, rows, heads, group, 2, dtype=torch.float32, pin_memory=pinned)
            """Log-sum-exp over all pages (estimate) and over the chosen ones, of the last step."""

    def nbytes(self) -> int:
        """Bytes on the device, most of them summaries."""
        scratch = (self._unit, self._logits, self._parts, self._exact, self._rotation, self._extents, self._chosen)
        return self.codes.nbytes() + sum(t.nbytes for t in scratch)

    def reset(self) -> None:
        """Forget all pages."""
        self.codes.words.zero_()
        self._extents.zero_()

    def update(
        self,
        slots: npt.NDArray[np.int64],
        words: npt.NDArray[np.int64],
        extents: npt.NDArray[np.int32],
        whole: npt.NDArray[np.bool_],
    ) -> None:
        """Take over what `Mirror.update` said, on the current stream; the pages must stay until it has run.

        Parameters
        ----------
        whole : numpy.ndarray
            bool (S * U,): units of which all pages are read.
        """
        from icecache.kernels.page_codes import page_codes

        device = self.step.device
        if n := len(slots):
            # An even length aligns the second row: with another alignment the kernel would be compiled once more.
            both = np.zeros((2, n + n % 2), np.int64)
            both[0, :n], both[1, :n] = slots, words
            on_device = torch.from_numpy(both).to(device)
            page_codes(self.codes, on_device[0, :n], on_device[1, :n], self._rotation, self._like)
        state = torch.from_numpy(np.stack([extents, whole.astype(np.int32)])).to(device)
        self._extents.copy_(state[0].view_as(self._extents))
        self._whole.copy_(state[1].view_as(self._whole))

    def find(
        self, search: int, query: torch.Tensor, table: torch.Tensor, scaling: float, softcap: float | None
    ) -> None:
        """Fill the table of a search.

        Parameters
        ----------
        query : torch.Tensor
            (B, H, G, D), contiguous, of the step's dtype.
        table : torch.Tensor
            int64 (B, H, K); written. Asynchronous on the current stream, may be captured.
        """
        from icecache.kernels.page_exact import page_exact
        from icecache.kernels.page_pick import page_pick
        from icecache.kernels.page_scan import SLOT_BLOCK, page_scan
        from icecache.kernels.page_select import page_select
        from icecache.kernels.rotate_queries import rotate_queries

        size = self._extents.shape[1] * self.shape.n_slots
        codes, extents = self.codes.part(search * size, (search + 1) * size), self._extents[search]
        rotate_queries(query, self._rotation, self._unit, self._length)
        page_scan(self._unit, self._length, extents, codes, self._logits, self._parts, scaling, softcap=softcap)
        chosen, counts = self._chosen, self._counts
        page_select(
            self._logits,
            self._parts,
            codes.words,
            extents,
            self._scratch,
            chosen,
            counts,
            self._lse,
            slot_block=SLOT_BLOCK,
        )
        page_exact(query, codes.words, chosen, counts, self._exact, scaling, softcap=softcap)
        page_pick(
            self._exact,
            self._logits,
            self._lse,
            codes.words,
            chosen,
            counts,
            self._whole[search],
            table,
            self.host_table[search],
            self.host_lse[search],
            n_pages=self.shape.n_pages,
        )
