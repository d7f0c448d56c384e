"""Merge partial attention results by log-sum-exp.

Dimension key: B sequences, H KV heads, S splits, G query heads per KV head, E value dim.

    lse[b, h, g] = log sum_s exp(lse[b, h, s, g])
    out[b, h, g] = sum_s exp(lse[b, h, s, g] - lse[b, h, g]) out[b, h, s, g]

A split with lse = -inf attended to nothing and counts for nothing; where all splits are empty, out = 0, lse = -inf.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

SPLIT_BLOCK = 32
"""Splits merged at a time; more of them are folded in a loop."""


@triton.jit
def _merge_splits_kernel(
    part_out_ptr,  # [B, H, S, G, E] float32
    part_lse_ptr,  # [B, H, S, G] float32
    out_ptr,  # [B, H, G, E]
    lse_ptr,  # [B, H, G] float32
    n_splits,
    G: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    SB: tl.constexpr,
):
    """One program per (sequence and KV head, query head)."""
    bh = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1)
    e = tl.arange(0, EP)
    m = float("-inf")
    total = 0.0
    acc = tl.zeros([EP], tl.float32)
    for first in range(0, n_splits, SB):
        s = first + tl.arange(0, SB)
        row = (bh * n_splits + s) * G + g
        lse = tl.load(part_lse_ptr + row, mask=s < n_splits, other=float("-inf"))
        part = tl.load(
            part_out_ptr + row[:, None] * E + e[None, :], mask=(s < n_splits)[:, None] & (e < E)[None, :], other=0.0
        )
        m_new = tl.maximum(m, tl.max(lse, 0))
        # Only empty splits so far: shift by 0, so that exp never sees inf - inf.
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        weight = tl.exp(lse - m_safe)
        rescale = tl.exp(m - m_safe)
        total = total * rescale + tl.sum(weight, 0)
        acc = acc * rescale + tl.sum(part * weight[:, None], 0)
        m = m_new
    safe = tl.where(total == 0.0, 1.0, total)
    target = bh * G + g
    tl.store(out_ptr + target * E + e, (acc / safe).to(out_ptr.dtype.element_ty), mask=e < E)
    tl.store(lse_ptr + target, tl.where(total == 0.0, float("-inf"), m + tl.log(safe)))


@torch.library.custom_op("icecache::merge_splits", mutates_args=())
def _merge_splits(out: torch.Tensor, lse: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    b, h, splits, g, value_dim = out.shape
    merged = torch.empty(b, h, g, value_dim, dtype=dtype, device=out.device)
    merged_lse = torch.empty(b, h, g, dtype=torch.float32, device=out.device)
    _merge_splits_kernel[(b * h, g)](
        out,
        lse,
        merged,
        merged_lse,
        splits,
        G=g,
        E=value_dim,
        EP=max(16, triton.next_power_of_2(value_dim)),
        SB=min(SPLIT_BLOCK, triton.next_power_of_2(splits)),
    )
    return merged, merged_lse


@_merge_splits.register_fake
def _(out: torch.Tensor, lse: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    b, h, _, g, value_dim = out.shape
    return out.new_empty(b, h, g, value_dim, dtype=dtype), lse.new_empty(b, h, g)


def merge_splits(out: torch.Tensor, lse: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge the partial results of the splits; see the module docstring.

    Parameters
    ----------
    out : torch.Tensor
        ``(B, H, S, G, E)`` float32, contiguous; S >= 1.
    lse : torch.Tensor
        ``(B, H, S, G)`` float32, contiguous.
    dtype : torch.dtype
        Of the merged output.

    Returns
    -------
    out : torch.Tensor
        ``(B, H, G, E)``.
    lse : torch.Tensor
        ``(B, H, G)`` float32, natural logarithm.

    Raises
    ------
    ValueError
        If a shape, dtype or memory layout differs from the above.
    """
    if out.dim() != 5 or out.shape[2] < 1 or out.dtype != torch.float32 or not out.is_contiguous():
        msg = f"out: expected a contiguous (B, H, S >= 1, G, E) float32 tensor, got {tuple(out.shape)} {out.dtype}"
        raise ValueError(msg)
    if lse.shape != out.shape[:4] or lse.dtype != torch.float32 or not lse.is_contiguous() or lse.device != out.device:
        msg = f"lse: expected {tuple(out.shape[:4])} float32 beside out, got {tuple(lse.shape)} {lse.dtype}"
        raise ValueError(msg)
    merged: tuple[torch.Tensor, torch.Tensor] = _merge_splits(out, lse, dtype)
    return merged


def merge_splits_ref(
    out: torch.Tensor, lse: torch.Tensor, *, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain torch version of `merge_splits`, computed in `dtype`."""
    out, lse = out.to(dtype), lse.to(dtype)
    merged_lse = torch.logsumexp(lse, dim=2)
    weight = torch.exp(lse - merged_lse.unsqueeze(2)).nan_to_num(0.0)  # -inf - -inf: no live token in any split
    return (out * weight.unsqueeze(-1)).sum(2), merged_lse
