"""Attention of one decoded token over the selected pages of the page store.

Dimension key: B sequences, H KV heads, G query heads per KV head, K selected pages, S splits of the page list,
N pages in the store, P tokens in a page, D head dim.

    out[b, h, g] = sum_i p_i v_i,   p = softmax(scale * q[b, h, g] . k_i)   over the live tokens i of the K pages
    lse[b, h, g] = log sum_i exp(scale * q[b, h, g] . k_i)                  natural logarithm

A head without a single live token gets out = 0 and lse = -inf, so that it drops out of a merge by log-sum-exp.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

LOG2E = 1.4426950408889634


@triton.jit
def _paged_decode_kernel(
    q_ptr,  # [B, H, G, D]
    pages_ptr,  # [N, 2, P, D], keys then values; may be pinned host memory
    table_ptr,  # [B, H, K] int32, page of each selected slot, -1 = none
    counts_ptr,  # [B, H, K] int32, live tokens of that page, first slots first
    out_ptr,  # [B, H, S, G, D] float32
    lse_ptr,  # [B, H, S, G] float32, natural logarithm
    n_selected,  # K
    pages_per_split,
    scale_log2,  # scale * log2(e)
    G: tl.constexpr,
    GP: tl.constexpr,  # G padded to what tl.dot accepts
    D: tl.constexpr,
    DP: tl.constexpr,  # D padded to a power of two
    P: tl.constexpr,
):
    """One program per (sequence and KV head, split). Online softmax in base 2, accumulated in float32."""
    bh = tl.program_id(0).to(tl.int64)  # int64: bh * K * P passes 2**31 for big batches
    split = tl.program_id(1)
    n_splits = tl.num_programs(1)
    g = tl.arange(0, GP)
    d = tl.arange(0, DP)
    t = tl.arange(0, P)
    q = tl.load(q_ptr + (bh * G + g)[:, None] * D + d[None, :], mask=(g < G)[:, None] & (d < D)[None, :], other=0.0)

    m = tl.full([GP], float("-inf"), tl.float32)
    denominator = tl.zeros([GP], tl.float32)
    acc = tl.zeros([GP, DP], tl.float32)
    first = split * pages_per_split
    last = tl.minimum(n_selected, first + pages_per_split)
    for i in range(first, last):
        page = tl.load(table_ptr + bh * n_selected + i).to(tl.int64)
        count = tl.where(page >= 0, tl.load(counts_ptr + bh * n_selected + i), 0)
        base = pages_ptr + tl.maximum(page, 0) * (2 * P * D)
        live = (t < count)[:, None] & (d < D)[None, :]
        k = tl.load(base + t[:, None] * D + d[None, :], mask=live, other=0.0)  # [P, D]
        v = tl.load(base + P * D + t[:, None] * D + d[None, :], mask=live, other=0.0)
        # ieee: float32 pages must not be rounded to tf32 on the tensor cores
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2  # [G, P]
        s = tl.where((t < count)[None, :], s, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        # An empty prefix keeps m at -inf; shift by 0 there so exp2 never sees inf - inf.
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        p = tl.exp2(s - m_safe[:, None])
        rescale = tl.exp2(m - m_safe)
        denominator = denominator * rescale + tl.sum(p, 1)
        acc = acc * rescale[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        m = m_new

    safe = tl.where(denominator == 0.0, 1.0, denominator)
    out = acc / safe[:, None]
    lse = tl.where(denominator == 0.0, float("-inf"), (m + tl.log2(safe)) / 1.4426950408889634)  # LOG2E
    row = (bh * n_splits + split) * G + g
    tl.store(out_ptr + row[:, None] * D + d[None, :], out, mask=(g < G)[:, None] & (d < D)[None, :])
    tl.store(lse_ptr + row, lse, mask=g < G)


def paged_decode(
    q: torch.Tensor,
    pages: torch.Tensor,
    table: torch.Tensor,
    counts: torch.Tensor,
    scale: float,
    *,
    splits: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to the selected pages; see the module docstring for the formula.

    Parameters
    ----------
    q : torch.Tensor
        ``(B, H, G, D)``, contiguous; float32, float16 or bfloat16.
    pages : torch.Tensor
        ``(N, 2, 16, D)``, contiguous, same dtype as `q`; on the device of `q` or in pinned host memory.
    table, counts : torch.Tensor
        ``(B, H, K)`` int32 on the device of `q`: page of each selected place (-1 = none) and its live tokens.
    scale : float
        Factor on the logits, usually ``D ** -0.5``.
    splits : int, default=1
        How many programs share the page list of one head; the partial results are merged by log-sum-exp.

    Returns
    -------
    out : torch.Tensor
        ``(B, H, G, D)`` in the dtype of `q`.
    lse : torch.Tensor
        ``(B, H, G)`` float32, natural logarithm; ``-inf`` where nothing was attended.

    Raises
    ------
    ValueError
        If a shape, dtype or memory layout differs from the above.

    Notes
    -----
    Asynchronous: runs on the current stream of the device of `q`.
    """
    b, h, g, d = _check(q, pages, table, counts, splits)
    n_selected = table.shape[2]
    out = torch.empty(b, h, splits, g, d, dtype=torch.float32, device=q.device)
    lse = torch.empty(b, h, splits, g, dtype=torch.float32, device=q.device)
    _paged_decode_kernel[(b * h, splits)](
        q,
        pages,
        table,
        counts,
        out,
        lse,
        n_selected,
        triton.cdiv(n_selected, splits),
        scale * LOG2E,
        G=g,
        GP=max(16, triton.next_power_of_2(g)),
        D=d,
        DP=max(16, triton.next_power_of_2(d)),
        P=pages.shape[2],
    )
    merged, merged_lse = merge_splits(out, lse)
    return merged.to(q.dtype), merged_lse


def merge_splits(out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge partial results ``(B, H, S, G, D)`` and ``(B, H, S, G)`` over S by log-sum-exp."""
    merged_lse = torch.logsumexp(lse, dim=2)
    weight = torch.exp(lse - merged_lse.unsqueeze(2)).nan_to_num(0.0)  # -inf - -inf: no live token in any split
    return (out * weight.unsqueeze(-1)).sum(2), merged_lse


def paged_decode_ref(
    q: torch.Tensor,
    pages: torch.Tensor,
    table: torch.Tensor,
    counts: torch.Tensor,
    scale: float,
    *,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain torch version of `paged_decode`, computed in `dtype`."""
    b, h, _g, d = q.shape
    page_tokens = pages.shape[2]
    picked = pages.to(q.device)[table.clamp(min=0).long()].to(dtype)  # [B, H, K, 2, P, D]
    keys, values = (picked[..., half, :, :].reshape(b, h, -1, d) for half in (0, 1))
    slot = torch.arange(page_tokens, device=q.device)
    live = (slot < torch.where(table >= 0, counts, 0).unsqueeze(-1)).reshape(b, h, 1, -1)
    logits = (q.to(dtype) @ keys.transpose(-1, -2) * scale).masked_fill(~live, float("-inf"))  # [B, H, G, K * P]
    return (torch.softmax(logits, -1).nan_to_num(0.0) @ values), torch.logsumexp(logits, -1)


def _check(
    q: torch.Tensor, pages: torch.Tensor, table: torch.Tensor, counts: torch.Tensor, splits: int
) -> tuple[int, int, int, int]:
    if q.dim() != 4 or not q.is_contiguous():
        msg = f"q: expected a contiguous (B, H, G, D) tensor, got {tuple(q.shape)}, strides {q.stride()}"
        raise ValueError(msg)
    b, h, g, d = q.shape
    if pages.dim() != 4 or pages.shape[1] != 2 or pages.shape[3] != d or not pages.is_contiguous():
        msg = f"pages: expected a contiguous (N, 2, P, {d}) tensor, got {tuple(pages.shape)}"
        raise ValueError(msg)
    if pages.dtype != q.dtype or q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        msg = f"q and pages: expected one dtype of float32, float16, bfloat16, got {q.dtype}, {pages.dtype}"
        raise ValueError(msg)
    page_tokens = pages.shape[2]
    if page_tokens < 16 or page_tokens & (page_tokens - 1):
        msg = f"pages: expected a power of two >= 16 as tokens per page, got {page_tokens}"
        raise ValueError(msg)
    if pages.device != q.device and not pages.is_pinned():
        msg = f"pages: expected on {q.device} or in pinned host memory, got pageable {pages.device} memory"
        raise ValueError(msg)
    for name, tensor in (("table", table), ("counts", counts)):
        if tensor.dim() != 3 or tensor.shape[:2] != (b, h) or tensor.dtype != torch.int32 or not tensor.is_contiguous():
            msg = f"{name}: expected a contiguous ({b}, {h}, K) int32 tensor, got {tuple(tensor.shape)} {tensor.dtype}"
            raise ValueError(msg)
        if tensor.device != q.device:
            msg = f"{name}: expected on {q.device}, got {tensor.device}"
            raise ValueError(msg)
    if counts.shape != table.shape:
        msg = f"counts: expected the shape of table {tuple(table.shape)}, got {tuple(counts.shape)}"
        raise ValueError(msg)
    if splits < 1:
        msg = f"splits: expected >= 1, got {splits}"
        raise ValueError(msg)
    return b, h, g, d
