"""Fold attention over one more part of the keys into what earlier parts gave, by log-sum-exp.

Dimension key: H KV heads, G query heads per KV head, Q queries, E value dim.

    total[h, g, q] = logaddexp(lse[h, g, q], part_lse[h, g, q])
    out[h, g, q]  <- exp(lse - total) out + exp(part_lse - total) part,   lse <- total

Where both are empty (-inf), out = 0 and lse = -inf.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

ROWS = 16
"""Queries of a program."""


@triton.jit
def _fold_part_kernel(
    part_ptr,  # [H, G, Q, E]
    part_lse_ptr,  # [H, G, Q] float32
    out_ptr,  # [H, G, Q, E] float32
    lse_ptr,  # [H, G, Q] float32
    n_queries,  # Q
    stride_h,
    stride_g,
    stride_q,
    G: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    R: tl.constexpr,
):
    """One program per (some queries, query head)."""
    hg = tl.program_id(1).to(tl.int64)
    q = tl.program_id(0) * R + tl.arange(0, R)
    e = tl.arange(0, EP)
    there = q < n_queries
    mask = there[:, None] & (e < E)[None, :]
    place = hg * n_queries + q
    new = tl.load(part_lse_ptr + place, mask=there, other=float("-inf"))
    old = tl.load(lse_ptr + place, mask=there, other=float("-inf"))
    top = tl.maximum(old, new)
    top = tl.where(top == float("-inf"), 0.0, top)
    a = tl.exp(old - top)
    b = tl.exp(new - top)
    both = a + b
    safe = tl.where(both == 0.0, 1.0, both)
    part_from = part_ptr + (hg // G) * stride_h + (hg % G) * stride_g + q[:, None].to(tl.int64) * stride_q + e[None, :]
    part = tl.load(part_from, mask=mask, other=0.0).to(tl.float32)
    out_to = out_ptr + place[:, None] * E + e[None, :]
    out = tl.load(out_to, mask=mask, other=0.0)
    tl.store(out_to, (a / safe)[:, None] * out + (b / safe)[:, None] * part, mask=mask)
    tl.store(lse_ptr + place, tl.where(both == 0.0, float("-inf"), top + tl.log(safe)), mask=there)


@torch.library.custom_op("icecache::fold_part", mutates_args=("out", "lse"))
def _fold_part(part: torch.Tensor, part_lse: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> None:
    h, g, n_queries, value_dim = part.shape
    _fold_part_kernel[(triton.cdiv(n_queries, ROWS), h * g)](
        part,
        part_lse,
        out,
        lse,
        n_queries,
        *part.stride()[:3],
        G=g,
        E=value_dim,
        EP=triton.next_power_of_2(value_dim),
        R=ROWS,
    )


@_fold_part.register_fake
def _(part: torch.Tensor, part_lse: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> None:
    return None


def fold_part(part: torch.Tensor, part_lse: torch.Tensor, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Fold `part` into `out` and `lse`, in place; see the module docstring.

    Parameters
    ----------
    part : torch.Tensor
        ``(H, G, Q, E)``, any float dtype, last dimension contiguous.
    part_lse : torch.Tensor
        ``(H, G, Q)`` float32, contiguous.
    out : torch.Tensor
        ``(H, G, Q, E)`` float32, contiguous.
    lse : torch.Tensor
        ``(H, G, Q)`` float32, contiguous.

    Raises
    ------
    ValueError
        If a shape, dtype or memory layout differs from the above.
    """
    if part.dim() != 4 or part.stride(3) != 1:
        msg = f"part: expected (H, G, Q, E) with a contiguous last dimension, got {tuple(part.shape)}"
        raise ValueError(msg)
    for name, tensor, shape in (
        ("part_lse", part_lse, part.shape[:3]),
        ("out", out, part.shape),
        ("lse", lse, part.shape[:3]),
    ):
        if tensor.shape != shape or tensor.dtype != torch.float32 or not tensor.is_contiguous():
            msg = f"{name}: expected contiguous {tuple(shape)} float32, got {tuple(tensor.shape)} {tensor.dtype}"
            raise ValueError(msg)
    _fold_part(part, part_lse, out, lse)


def fold_part_ref(
    part: torch.Tensor,
    part_lse: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    *,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain torch version of `fold_part`, computed in `dtype`; nothing is changed."""
    total = torch.logaddexp(lse.to(dtype), part_lse.to(dtype))
    a, b = (torch.exp(x.to(dtype) - total).nan_to_num(0.0)[..., None] for x in (lse, part_lse))
    return a * out.to(dtype) + b * part.to(dtype), total
