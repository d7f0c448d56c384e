"""What attention would give for the pages that are not read, if the values of a page were all its mean.

Dimension key: U units, that is (sequence, KV head), N slots of a unit, G query heads per KV head, E value dim, J blocks
of `SLOT_BLOCK` slots.

    weight[u, g, n] = exp(logits[u, g, n])       what `page_pick` has left: 0 for pages that are read, or not there
    out[u, g]       = sum_n weight[u, g, n] mean[u, n] / sum_n weight[u, g, n],       0 where no page is left

Each block writes a partial result; `merge_splits` folds them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from icecache.kernels.merge_splits import merge_splits
from icecache.kernels.page_values import PageValues

SLOT_BLOCK = 128
"""Slots of a program."""


@triton.jit
def _page_unread_kernel(
    logits_ptr,  # [U, G, N] float32
    extents_ptr,  # [U] int32, slots in use
    levels_ptr,  # [U, N, E / 2] uint8
    scales_ptr,  # [U, N] float32
    out_ptr,  # [U, J, G, E] float32
    lse_ptr,  # [U, J, G] float32
    n_slots,  # N
    G: tl.constexpr,
    GP: tl.constexpr,  # G padded to what tl.dot accepts
    E: tl.constexpr,
    HP: tl.constexpr,  # E / 2 padded likewise
    NB: tl.constexpr,
):
    """One program per (block of slots, unit)."""
    block = tl.program_id(0)
    u = tl.program_id(1).to(tl.int64)
    n = block * NB + tl.arange(0, NB)
    inside = n < tl.load(extents_ptr + u)
    slot = u * n_slots + n  # int64: slots of one unit times E pass 2**31
    g = tl.arange(0, GP)
    j = tl.arange(0, HP)
    logit_ptr = logits_ptr + (u * G + g)[None, :] * n_slots + n[:, None]
    logit = tl.load(logit_ptr, mask=inside[:, None] & (g < G)[None, :], other=float("-inf"))  # [NB, GP]
    top = tl.max(logit, 0)
    weight = tl.exp(logit - tl.where(top == float("-inf"), 0.0, top)[None, :])
    total = tl.sum(weight, 0)
    # Levels are exact in half precision; scales relative to the largest keep the weights in its range.
    scale = tl.load(scales_ptr + slot, mask=inside, other=0.0)
    largest = tl.max(scale, 0)
    relative = scale / tl.where(largest > 0.0, largest, 1.0)
    scaled = (weight * relative[:, None]).to(tl.float16)
    byte_ptr = levels_ptr + slot[:, None] * (E // 2) + j[None, :]
    byte = tl.load(byte_ptr, mask=inside[:, None] & (j < E // 2)[None, :], other=136).to(tl.int32)  # 136: zero twice
    even = tl.dot(tl.trans(((byte & 15) - 8).to(tl.float16)), scaled)  # [HP, GP]
    odd = tl.dot(tl.trans(((byte >> 4) - 8).to(tl.float16)), scaled)
    factor = largest / tl.where(total > 0.0, total, 1.0)
    row = (u * tl.num_programs(0) + block) * G + g
    at = out_ptr + row[None, :] * E + 2 * j[:, None]
    inner = (j < E // 2)[:, None] & (g < G)[None, :]
    tl.store(at, even * factor[None, :], mask=inner)
    tl.store(at + 1, odd * factor[None, :], mask=inner)
    lse = tl.where(total > 0.0, top + tl.log(tl.where(total > 0.0, total, 1.0)), float("-inf"))
    tl.store(lse_ptr + row, lse, mask=g < G)


@torch.library.custom_op("icecache::page_unread", mutates_args=())
def _page_unread(
    logits: torch.Tensor,
    extents: torch.Tensor,
    levels: torch.Tensor,
    scales: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    units, g, n = logits.shape
    dim, blocks = 2 * levels.shape[1], triton.cdiv(n, SLOT_BLOCK)
    out = torch.empty(units, blocks, g, dim, dtype=torch.float32, device=logits.device)
    lse = torch.empty(units, blocks, g, dtype=torch.float32, device=logits.device)
    _page_unread_kernel[(blocks, units)](
        logits,
        extents,
        levels,
        scales,
        out,
        lse,
        n,
        G=g,
        GP=max(8, triton.next_power_of_2(g)),
        E=dim,
        HP=max(16, triton.next_power_of_2(dim // 2)),
        NB=SLOT_BLOCK,
        num_warps=4,
    )
    return out, lse


@_page_unread.register_fake
def _(
    logits: torch.Tensor,
    extents: torch.Tensor,
    levels: torch.Tensor,
    scales: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    units, g, n = logits.shape
    lead = (units, triton.cdiv(n, SLOT_BLOCK), g)
    return logits.new_empty(*lead, 2 * levels.shape[1]), logits.new_empty(*lead)


def page_unread(logits: torch.Tensor, extents: torch.Tensor, values: PageValues, n_rows: int) -> torch.Tensor:
    """Average the mean values of the pages that are not read; see the module docstring.

    Parameters
    ----------
    logits : torch.Tensor
        float32 (U, G, N), contiguous, as `page_pick` leaves it.
    extents : torch.Tensor
        int32 (U,): slots from there on hold no page.
    values : PageValues
        Of the U * N slots.
    n_rows : int
        B; U is B * H.

    Returns
    -------
    torch.Tensor
        float32 (B, H, G, E). Asynchronous on the current stream, may be captured.

    Raises
    ------
    ValueError
        If a shape or dtype differs from the above.
    """
    units, g, n = logits.shape
    expected = (
        ("logits", logits, (units, g, n), torch.float32),
        ("extents", extents, (units,), torch.int32),
        ("levels", values.levels, (units * n, values.levels.shape[1]), torch.uint8),
        ("scales", values.scales, (units * n,), torch.float32),
    )
    for name, tensor, shape, dtype in expected:
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            msg = f"{name}: expected contiguous {shape} of {dtype}, got {tuple(tensor.shape)} of {tensor.dtype}"
            raise ValueError(msg)
    if n_rows < 1 or units % n_rows:
        msg = f"n_rows: expected a divisor of {units} units, got {n_rows}"
        raise ValueError(msg)
    out, lse = _page_unread(logits, extents, values.levels, values.scales)
    lead = n_rows, units // n_rows
    return merge_splits(out.view(*lead, *out.shape[1:]), lse.view(*lead, *lse.shape[1:]), torch.float32)[0]


def page_unread_ref(logits: torch.Tensor, extents: torch.Tensor, means: torch.Tensor) -> torch.Tensor:
    """Plain torch version of `page_unread` in float64.

    Parameters
    ----------
    logits : torch.Tensor
        (U, G, N).
    extents : torch.Tensor
        int (U,).
    means : torch.Tensor
        (U, N, E).

    Returns
    -------
    torch.Tensor
        float64 (U, G, E).
    """
    there = torch.arange(logits.shape[2], device=logits.device) < extents[:, None]
    masked = logits.double().masked_fill(~there[:, None], float("-inf"))
    return torch.softmax(masked, -1).nan_to_num(0.0) @ means.double()
