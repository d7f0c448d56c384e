"""Page summaries of all layers on the device, and the search among them: everything a captured step launches.

Dimension key: S searches (groups of layers), B rows, H KV heads, G query heads per KV head, D key dim, U = B * H units
of a search, N slots of a unit, C candidates, K places of the page table.

Every page is estimated from two bits per element of its keys; the best C are scored from the keys of their best
tokens, read where they lie, and the best of those are read by attention. With one bit an element on the device, the
others lie in host memory: then all pages are estimated from the first bits, and the best `COARSE` C of them from both.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from icecache.attention.device import StepShape

MIN_CANDIDATES = 64
"""Fewest pages scored from their keys. With two bits 64 of 1000 pages lose less of the attention mass than 312 do that
are ranked by their means (13 read; benches/results/summaries-16k.txt)."""
BEST_TOKENS = 4
"""Keys read of a page that is scored; the same file."""
COARSE = 4
"""Pages estimated from both bits per page scored, where the device has one bit."""
Lend = Callable[[int], npt.NDArray[np.uint8]]
_UPLOAD = 1 << 14
"""Slots named to the device at a time: more than an insert of 16 tokens into 500 trees changes."""


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
    bits : int
        Per element of a key on the device, 1 or 2.
    n_pages : int
        Pages to choose.
    """

    n_slots: int
    bits: int
    n_pages: int

    def nbytes(self, step: StepShape) -> int:
        """Bytes on the device."""
        from icecache.kernels.page_codes import slot_bytes
        from icecache.kernels.page_values import value_bytes

        units = step.n_rows * step.n_kv_heads
        scratch = units * (step.group * (4 * self.n_slots + 8 * (self.n_slots // 64 + 1)))
        of_slot = slot_bytes(self.bits, step.key_dim) + (value_bytes(step.value_dim) if step.estimates else 0)
        return step.n_searches * units * self.n_slots * of_slot + scratch

    def host_bytes(self, step: StepShape) -> int:
        """Bytes of host memory that the device reads and writes."""
        n_slots = step.n_searches * step.n_rows * step.n_kv_heads * self.n_slots
        return 0 if self.bits == 2 else 2 * step.key_dim * n_slots


class PageFinder:
    """Chooses the pages of a step on the device.

    Parameters
    ----------
    step : StepShape
    shape : FinderShape
    lend : callable or None
        Gives so many bytes of zeroed host memory that the device reads; None: torch does, for a device that is the CPU
        itself.

    Raises
    ------
    torch.OutOfMemoryError, MemoryError
        If the device or the host has no room.
    """

    def __init__(self, step: StepShape, shape: FinderShape, lend: Lend | None = None) -> None:
        from icecache.kernels.page_codes import empty_codes, rotation_matrix
        from icecache.kernels.page_scan import n_parts
        from icecache.kernels.page_select import select_scratch
        from icecache.kernels.page_values import empty_values

        self.step, self.shape = step, shape
        searches, rows, heads, group, dim = step.n_searches, step.n_rows, step.n_kv_heads, step.group, step.key_dim
        units, candidates = rows * heads, n_candidates(shape.n_pages)
        device = step.device
        ints = functools.partial(torch.zeros, dtype=torch.int32, device=device)
        floats = functools.partial(torch.zeros, dtype=torch.float32, device=device)
        pinned = device.type == "cuda"
        # Not in inference mode: in-place writes from outside of it would be refused.
        with torch.inference_mode(mode=False):
            n_slots = searches * units * shape.n_slots
            fine = None if shape.bits == 2 else _second_bits(lend, n_slots, dim)
            self.codes = empty_codes(n_slots, dim, device, fine)
            self.values = empty_values(n_slots, step.value_dim, device) if step.estimates else None
            self._unread: torch.Tensor | None = None
            self._rotation = rotation_matrix(dim, device)
            self._like = torch.zeros(1, dtype=step.dtype, device=device)
            self._units = ints(2, searches, units)
            self._extents, self._whole = self._units
            self._named = torch.zeros(2, _UPLOAD, dtype=torch.int64, device=device)
            self._host_units = torch.zeros_like(self._units, device="cpu", pin_memory=pinned)
            self._host_named = torch.zeros_like(self._named, device="cpu", pin_memory=pinned)
            self._unit = torch.zeros(rows, heads, group, dim, dtype=torch.float16, device=device)
            self._length = floats(rows, heads, group)
            self._logits = floats(units, group, shape.n_slots)
            self._parts = floats(units, n_parts(shape.n_slots), group, 2)
            coarse = candidates * (1 if shape.bits == 2 else COARSE)
            self._scratch = ints(select_scratch(units, shape.n_slots, coarse))
            self._coarse, self._coarse_counts = ints(units, coarse), ints(units)
            self._refined = floats(units, coarse, group)
            self._chosen, self._counts = ints(units, candidates), ints(units)
            self._lse, self._exact = floats(units, group), floats(units, candidates, group)
            self.host_table = torch.zeros(searches, rows, heads, step.n_pages, dtype=torch.int64, pin_memory=pinned)
            """Page words of the last step, as the table on the device; ready when the step is."""
            self.host_lse = torch.zeros(searches, rows, heads, group, 2, dtype=torch.float32, pin_memory=pinned)
            """Log-sum-exp over all pages (estimate) and over the chosen ones, of the last step."""

    def nbytes(self) -> int:
        """Bytes on the device, most of them summaries."""
        scratch = (self._unit, self._logits, self._parts, self._exact, self._rotation, self._extents, self._chosen)
        values = 0 if self.values is None else self.values.nbytes()
        return self.codes.nbytes() + values + sum(t.nbytes for t in scratch)

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

        The device must be done with the call before.

        Parameters
        ----------
        whole : numpy.ndarray
            bool (S * U,): units of which all pages are read.
        """
        from icecache.kernels.page_codes import page_codes
        from icecache.kernels.page_values import page_values

        for first in range(0, len(slots), _UPLOAD):
            n = len(slots[first : first + _UPLOAD])
            named = self._host_named.numpy()
            named[0, :n], named[1, :n] = slots[first : first + n], words[first : first + n]
            # More than one piece is rare: each waits for the one before, whose names lie in the same memory.
            self._named.copy_(self._host_named, non_blocking=len(slots) <= _UPLOAD)
            changed = self._named[0, :n], self._named[1, :n]
            page_codes(self.codes, *changed, self._rotation, self._like)
            if self.values is not None:
                page_values(self.values, *changed, self._like, key_dim=self.step.key_dim)
        units = self._host_units.numpy()
        units[0], units[1] = extents.reshape(units.shape[1:]), whole.reshape(units.shape[1:])
        self._units.copy_(self._host_units, non_blocking=True)

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
        from icecache.kernels.page_refine import page_refine
        from icecache.kernels.page_scan import SLOT_BLOCK, page_scan
        from icecache.kernels.page_select import page_select
        from icecache.kernels.page_unread import page_unread
        from icecache.kernels.rotate_queries import rotate_queries

        size = self._extents.shape[1] * self.shape.n_slots
        codes, extents = self.codes.part(search * size, (search + 1) * size), self._extents[search]
        queries = self._unit, self._length
        rotate_queries(query, self._rotation, *queries)
        narrows = self.shape.bits == 1
        logits, parts, lse, chosen, counts = self._logits, self._parts, self._lse, self._chosen, self._counts
        page_scan(*queries, extents, codes, logits, parts, scaling, softcap=softcap, fine=not narrows)
        coarse = (self._coarse, self._coarse_counts) if narrows else (chosen, counts)
        page_select(logits, parts, codes.words, extents, self._scratch, *coarse, lse, slot_block=SLOT_BLOCK)
        if narrows:
            found = *coarse, self._refined, chosen, counts
            page_refine(*queries, codes, logits, lse, *found, scaling, softcap=softcap)
        scores = self._exact
        page_exact(query, *queries, lse, codes, chosen, counts, scores, scaling, softcap=softcap, best=BEST_TOKENS)
        page_pick(
            scores,
            logits,
            lse,
            codes.words,
            chosen,
            counts,
            self._whole[search],
            table,
            self.host_table[search],
            self.host_lse[search],
            n_pages=self.shape.n_pages,
            leaves=self.values is not None,
        )
        if self.values is not None:
            values = self.values.part(search * size, (search + 1) * size)
            self._unread = page_unread(logits, extents, values, self.step.n_rows)

    def unread(self, search: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Estimate of the pages that `search`, the last one, has not chosen, for `paged_decode`; None: not asked for.

        The log-sum-exps lie in the host's memory, which the device reads while it waits for pages from there anyway.
        """
        return None if self._unread is None else (self.host_lse[search], self._unread)


def _second_bits(lend: Lend | None, n_slots: int, dim: int) -> torch.Tensor:
    """Zeros, int16 (S, D), on the host."""
    if lend is None:
        return torch.zeros(n_slots, dim, dtype=torch.int16)
    n_bytes = 2 * n_slots * dim
    return torch.from_numpy(lend(n_bytes))[:n_bytes].view(torch.int16).view(n_slots, dim)
