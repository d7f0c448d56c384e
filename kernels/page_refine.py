"""Narrow candidates down by both bits of their summaries, where the scan of all pages read the signs only.

Dimension key: U units, N slots of a unit, G query heads per KV head, D key dim, C candidates, K kept, T = 16 tokens.

    fine[u, c, g]  = estimate of page chosen[u, c] as `page_scan` makes it from both bits
    total[u, g]    = sum over all pages, see `page_pick`, with `fine` in place of exact scores
    weight[u, c]   = sum_g exp(fine[u, c, g]) / total[u, g]

The K candidates with the largest weights, in ascending order of slots. `fine` bits may lie in page-locked host memory:
256 bytes a page at 128 dimensions, where its keys have 4096.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from icecache.kernels.page_codes import PAGE_TOKENS, PageCodes
from icecache.kernels.page_pick import page_pick_ref, weights_of
from icecache.kernels.page_scan import REACH
from icecache.kernels.page_select import choose


@triton.jit
def summary_logits(
    unit_ptr,  # [U, G, D] float16
    factor,  # [GP] scale * length
    signs_ptr,
    fine_ptr,
    means_ptr,
    shares_ptr,
    numbers_ptr,
    stride_numbers,
    u,
    slot,  # of all units
    reach,
    softcap,
    HAS_CAP: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    T: tl.constexpr,
):
    """Logits [GP, T] of the tokens of one page, from its summary."""
    g = tl.arange(0, GP)
    d = tl.arange(0, DP)
    t = tl.arange(0, T)
    q = tl.load(unit_ptr + (u * G + g)[:, None] * D + d[None, :], mask=(g < G)[:, None] & (d < D)[None, :], other=0.0)
    signs = tl.load(signs_ptr + slot * D + d, mask=d < D, other=0).to(tl.int32)
    fine = tl.load(fine_ptr + slot * D + d, mask=d < D, other=0).to(tl.int32)
    byte = tl.load(means_ptr + slot * (D // 2) + d // 2, mask=d < D, other=136).to(tl.int32)  # two zeros
    level = (((byte >> (4 * (d % 2))) & 15) - 8).to(tl.float32)
    v = 3 - 4 * ((signs[None, :] >> t[:, None]) & 1) - 2 * ((fine[None, :] >> t[:, None]) & 1)  # [T, DP]
    along = tl.dot(q, tl.trans(v.to(tl.float16)))  # [GP, T]; elements behind D meet zeros of q
    along_mean = tl.sum(q.to(tl.float32) * level[None, :], 1)
    mean_scale = tl.load(numbers_ptr + slot)
    step = tl.load(numbers_ptr + stride_numbers + slot)
    distance = tl.load(numbers_ptr + 2 * stride_numbers + slot)
    share = tl.load(shares_ptr + slot * T + t).to(tl.float32) / 255.0
    base = along_mean * mean_scale + reach * distance
    logits = (base[:, None] + (step * share)[None, :] * along) * factor[:, None]
    if HAS_CAP:
        logits = softcap * (2.0 * tl.sigmoid(2.0 * logits / softcap) - 1.0)
    return logits


@triton.jit
def _page_refine_kernel(
    unit_ptr,  # [U, G, D] float16
    length_ptr,  # [U, G] float32
    words_ptr,  # [U, N] int64
    signs_ptr,  # [U, N, D] int16
    fine_ptr,  # [U, N, D] int16
    means_ptr,  # [U, N, D / 2] uint8
    shares_ptr,  # [U, N, 16] uint8
    numbers_ptr,  # [3, ...] float32
    chosen_ptr,  # [U, C] int32
    counts_ptr,  # [U] int32
    out_ptr,  # [U, C, G] float32
    stride_numbers,
    n_slots,  # N
    n_candidates,  # C
    scale,
    reach,
    softcap,
    HAS_CAP: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    T: tl.constexpr,
):
    """One program per (candidate, unit): many small ones hide the latency of the bus."""
    c = tl.program_id(0)
    u = tl.program_id(1).to(tl.int64)
    if c >= tl.load(counts_ptr + u):
        return
    g = tl.arange(0, GP)
    t = tl.arange(0, T)
    slot = u * n_slots + tl.load(chosen_ptr + u * n_candidates + c)
    live = ((tl.load(words_ptr + slot) >> (t + 48).to(tl.int64)) & 1) != 0
    factor = scale * tl.load(length_ptr + u * G + g, mask=g < G, other=0.0)
    logits = summary_logits(
        unit_ptr, factor, signs_ptr, fine_ptr, means_ptr, shares_ptr, numbers_ptr, stride_numbers, u, slot, reach,
        softcap, HAS_CAP, G, GP, D, DP, T,
    )  # fmt: skip
    logits = tl.where(live[None, :], logits, float("-inf"))
    top = tl.max(logits, 1)
    lse = top + tl.log(tl.sum(tl.exp(logits - top[:, None]), 1))
    tl.store(out_ptr + (u * n_candidates + c) * G + g, lse, mask=g < G)


@triton.jit
def _page_narrow_kernel(
    fine_ptr,  # [U, C, G] float32
    logits_ptr,  # [U, G, N] float32
    lse_ptr,  # [U, G] float32
    chosen_ptr,  # [U, C] int32
    counts_ptr,  # [U] int32
    kept_ptr,  # [U, K] int32
    kept_counts_ptr,  # [U] int32
    n_slots,  # N
    n_candidates,  # C
    n_kept,  # K
    G: tl.constexpr,
    GP: tl.constexpr,
    CP: tl.constexpr,
):
    """One program per unit."""
    u = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, CP)
    there = c < tl.load(counts_ptr + u)
    slot = tl.load(chosen_ptr + u * n_candidates + c, mask=there, other=0)
    weight, _exact, _mass, _top, _total, _excess = weights_of(
        fine_ptr, logits_ptr, lse_ptr, u, c, slot, there, n_slots, n_candidates, tl.full([], 0, tl.int32), G, GP
    )
    taken = choose(tl.where(there, tl.maximum(weight.to(tl.int32, bitcast=True), 1), 0), n_kept)
    place = tl.cumsum(taken.to(tl.int32), 0) - 1
    tl.store(kept_ptr + u * n_kept + place, slot, mask=taken)
    tl.store(kept_counts_ptr + u, tl.sum(taken.to(tl.int32), 0))


@torch.library.custom_op("icecache::page_refine", mutates_args=("scores", "kept", "kept_counts"))
def _page_refine(
    unit: torch.Tensor,
    length: torch.Tensor,
    words: torch.Tensor,
    signs: torch.Tensor,
    fine: torch.Tensor,
    means: torch.Tensor,
    shares: torch.Tensor,
    numbers: torch.Tensor,
    logits: torch.Tensor,
    lse: torch.Tensor,
    chosen: torch.Tensor,
    counts: torch.Tensor,
    scores: torch.Tensor,
    kept: torch.Tensor,
    kept_counts: torch.Tensor,
    scale: float,
    softcap: float,
) -> None:
    units, n_candidates, g = scores.shape
    d, n = signs.shape[1], logits.shape[2]
    _page_refine_kernel[(n_candidates, units)](
        unit,
        length,
        words,
        signs,
        fine,
        means,
        shares,
        numbers,
        chosen,
        counts,
        scores,
        numbers.stride(0),
        n,
        n_candidates,
        scale,
        REACH[1],
        softcap,
        HAS_CAP=softcap > 0.0,
        G=g,
        GP=max(16, triton.next_power_of_2(g)),
        D=d,
        DP=max(16, triton.next_power_of_2(d)),
        T=PAGE_TOKENS,
        num_warps=2,
    )
    _page_narrow_kernel[(units,)](
        scores,
        logits,
        lse,
        chosen,
        counts,
        kept,
        kept_counts,
        n,
        n_candidates,
        kept.shape[1],
        G=g,
        GP=triton.next_power_of_2(g),
        CP=triton.next_power_of_2(n_candidates),
        num_warps=4,
    )


@_page_refine.register_fake
def _(
    unit: torch.Tensor,
    length: torch.Tensor,
    words: torch.Tensor,
    signs: torch.Tensor,
    fine: torch.Tensor,
    means: torch.Tensor,
    shares: torch.Tensor,
    numbers: torch.Tensor,
    logits: torch.Tensor,
    lse: torch.Tensor,
    chosen: torch.Tensor,
    counts: torch.Tensor,
    scores: torch.Tensor,
    kept: torch.Tensor,
    kept_counts: torch.Tensor,
    scale: float,
    softcap: float,
) -> None:
    return None


def page_refine(
    unit: torch.Tensor,
    length: torch.Tensor,
    codes: PageCodes,
    logits: torch.Tensor,
    lse: torch.Tensor,
    chosen: torch.Tensor,
    counts: torch.Tensor,
    scores: torch.Tensor,
    kept: torch.Tensor,
    kept_counts: torch.Tensor,
    scale: float,
    *,
    softcap: float | None = None,
) -> None:
    """Keep the best candidates; see the module docstring.

    Parameters
    ----------
    unit, length : torch.Tensor
        As `rotate_queries` writes them; the first two axes together are U.
    codes : PageCodes
        Of U * N slots.
    logits, lse, chosen, counts : torch.Tensor
        Of the scan by signs, as `page_scan` and `page_select` write them.
    scores : torch.Tensor
        float32 (U, C, G), contiguous; written up to the counts: the estimates by both bits.
    kept, kept_counts : torch.Tensor
        int32 (U, K) and (U,); written as `page_select` writes `chosen` and `counts`.
    scale, softcap
        As for `page_scan`.

    Raises
    ------
    ValueError
        If a shape or dtype differs from the above.
    """
    units, n_candidates, g = scores.shape
    d, n = codes.signs.shape[1], logits.shape[2]
    expected = (
        ("unit", unit.flatten(0, -3), (units, g, d), torch.float16),
        ("length", length.flatten(0, -2), (units, g), torch.float32),
        ("words", codes.words, (units * n,), torch.int64),
        ("logits", logits, (units, g, n), torch.float32),
        ("lse", lse, (units, g), torch.float32),
        ("chosen", chosen, (units, n_candidates), torch.int32),
        ("counts", counts, (units,), torch.int32),
        ("scores", scores, (units, n_candidates, g), torch.float32),
        ("kept", kept, (units, kept.shape[-1]), torch.int32),
        ("kept_counts", kept_counts, (units,), torch.int32),
    )
    for name, tensor, shape, dtype in expected:
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            msg = f"{name}: expected contiguous {shape} of {dtype}, got {tuple(tensor.shape)} of {tensor.dtype}"
            raise ValueError(msg)
    found = logits, lse, chosen, counts, scores, kept, kept_counts
    _page_refine(unit, length, *codes.tensors(), *found, scale, softcap or 0.0)


def page_refine_ref(fine: torch.Tensor, logits: torch.Tensor, chosen: list[list[int]], n_kept: int) -> list[list[int]]:
    """Slots that `page_refine` keeps, from the estimates (U, G, N) of all pages by both bits and by signs."""
    return page_pick_ref(fine.transpose(1, 2), logits, chosen, n_kept)[0]
