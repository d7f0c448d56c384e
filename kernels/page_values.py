"""Mean values of pages on the device, 4 bits an element: what an estimate of unread pages is made of.

Dimension key: S slots, E value dim, T = 16 tokens of a page.

    mean = sum over live t of v[t] / number of live t ~ scale * level,   level in -7 .. 7

A slot holds elements 2 j and 2 j + 1 of ``level + 8`` in the low and high half of byte j, and its scale. Values are
read where pages lie, which may be page-locked host memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

PAGE_TOKENS = 16


class PageValues:
    """Mean values of slots: `levels` uint8 (S, E / 2), `scales` float32 (S,)."""

    __slots__ = ("levels", "scales")

    def __init__(self, levels: torch.Tensor, scales: torch.Tensor) -> None:
        self.levels, self.scales = levels, scales

    def part(self, first: int, stop: int) -> PageValues:
        """View some slots."""
        return PageValues(self.levels[first:stop], self.scales[first:stop])

    def nbytes(self) -> int:
        """Bytes on the device."""
        return self.levels.nbytes + self.scales.nbytes


def value_bytes(dim: int) -> int:
    """Bytes of one slot."""
    return dim // 2 + 4


def empty_values(n_slots: int, dim: int, device: torch.device) -> PageValues:
    """Slots without a page.

    Raises
    ------
    ValueError
        If `dim` is odd.
    """
    if dim % 2:
        msg = f"dim: expected an even number, got {dim}"
        raise ValueError(msg)
    levels = torch.zeros(n_slots, dim // 2, dtype=torch.uint8, device=device)
    return PageValues(levels, torch.zeros(n_slots, device=device))


@triton.jit
def _page_values_kernel(
    slots_ptr,  # [n] int64
    new_ptr,  # [n] int64 words
    levels_ptr,  # [S, E / 2]
    scales_ptr,  # [S]
    like_ptr,  # anything of the pages' dtype
    V_OFFSET: tl.constexpr,  # elements from a page's address to its first value
    E: tl.constexpr,
    EP: tl.constexpr,
    T: tl.constexpr,
):
    """One program per changed slot."""
    element = like_ptr.dtype.element_ty
    slot = tl.load(slots_ptr + tl.program_id(0))
    word = tl.load(new_ptr + tl.program_id(0))
    if word != 0:
        t = tl.arange(0, T)
        e = tl.arange(0, EP)
        live = ((word >> (t + 48).to(tl.int64)) & 1) != 0
        page = (word & 0xFFFFFFFFFFFF).to(tl.pointer_type(element))
        page = tl.multiple_of(page, 16)
        at = page + V_OFFSET + t[:, None] * E + e[None, :]
        values = tl.load(at, mask=live[:, None] & (e < E)[None, :], other=0.0).to(tl.float32)
        mean = tl.sum(values, 0) / tl.sum(live.to(tl.float32), 0)
        scale = tl.max(tl.abs(mean), 0) / 7.0
        inverse = tl.where(scale > 0.0, 1.0 / scale, 0.0)
        level = tl.minimum(tl.maximum(tl.floor(mean * inverse + 0.5), -7.0), 7.0)
        low, high = tl.split(tl.reshape((level + 8.0).to(tl.int32), [EP // 2, 2]))
        j = tl.arange(0, EP // 2)
        tl.store(levels_ptr + slot * (E // 2) + j, (low | (high << 4)).to(tl.uint8), mask=j < E // 2)
        tl.store(scales_ptr + slot, scale)


@torch.library.custom_op("icecache::page_values", mutates_args=("levels", "scales"))
def _page_values(
    slots: torch.Tensor,
    new: torch.Tensor,
    like: torch.Tensor,
    levels: torch.Tensor,
    scales: torch.Tensor,
    value_offset: int,
) -> None:
    dim = 2 * levels.shape[1]
    _page_values_kernel[(slots.numel(),)](
        slots,
        new,
        levels,
        scales,
        like,
        V_OFFSET=value_offset,
        E=dim,
        EP=triton.next_power_of_2(dim),
        T=PAGE_TOKENS,
        num_warps=4,
    )


@_page_values.register_fake
def _(
    slots: torch.Tensor,
    new: torch.Tensor,
    like: torch.Tensor,
    levels: torch.Tensor,
    scales: torch.Tensor,
    value_offset: int,
) -> None:
    return None


def page_values(
    values: PageValues, slots: torch.Tensor, words: torch.Tensor, like: torch.Tensor, *, key_dim: int
) -> None:
    """Put the mean values of pages into slots; see the module docstring.

    Parameters
    ----------
    values : PageValues
        Written in place, but for slots whose word is 0.
    slots, words : torch.Tensor
        int64 (n,), contiguous: slots that change, each once, and their new words. The pages must stay as they are until
        the kernel has run: 16 keys, then 16 values.
    like : torch.Tensor
        Not empty, of the pages' dtype.
    key_dim : int
        Elements of a key.

    Raises
    ------
    ValueError
        If a shape or dtype differs from the above.

    Notes
    -----
    Asynchronous on the current stream. Neither slots nor addresses are checked.
    """
    for name, tensor in (("slots", slots), ("words", words)):
        if tensor.shape != slots.shape or tensor.dtype != torch.int64 or tensor.dim() != 1:
            msg = f"{name}: expected one axis of int64 as long as slots, got {tuple(tensor.shape)} of {tensor.dtype}"
            raise ValueError(msg)
    if slots.numel():
        offset = PAGE_TOKENS * key_dim
        _page_values(slots.contiguous(), words.contiguous(), like, values.levels, values.scales, offset)


def decoded_values(values: PageValues) -> torch.Tensor:
    """Means of all slots, float32 (S, E)."""
    byte = values.levels.long()
    return (torch.stack([byte & 15, byte >> 4], -1).flatten(1) - 8) * values.scales[:, None]
