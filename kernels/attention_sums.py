"""Who was attended in a prompt: the softmax weights of all queries, summed up for each key.

Dimension key: B sequences, H KV heads, G query heads per KV head, Q queries, N keys, D head dim. Query i stands at
position N - Q + i.

    sums[b, h, n] = sum over g and i of softmax_m(logit[g, i, m])[n],   m <= N - Q + i, valid queries and keys only
    logit[g, i, m] = scale * q[b, h, g, i] . k[b, h, m], through cap * tanh(. / cap) if there is a soft cap

Two passes, because a weight is known only when its row is: the first keeps the log-sum-exp of each query, the second
walks down the columns. Nothing of size Q x N is ever written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 64
"""Queries and keys of a tile; 32 where heads are wide, for the sake of shared memory."""
WIDE_BYTES = 512


@triton.jit
def _tile(q, k, seen, scale, softcap, HAS_CAP: tl.constexpr):
    """Logits [queries, keys] in base 2, -inf where a key is not seen."""
    # ieee: float32 must not be rounded to tf32 on the tensor cores
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if HAS_CAP:
        s = softcap * (2.0 * tl.sigmoid(2.0 * s / softcap) - 1.0)
    return tl.where(seen, s * 1.4426950408889634, float("-inf"))  # log2(e)


@triton.jit
def _lse_kernel(
    q_ptr,  # [B, H, G, Q, D]
    k_ptr,  # [B, H, N, D]
    valid_ptr,  # [B, N] int8
    lse_ptr,  # [B, H, G, Q] float32, base 2; +inf for a query that counts for nothing
    n_heads,  # H
    n_queries,  # Q
    n_keys,  # N
    stride_kb,
    stride_kh,
    stride_kn,
    scale,
    softcap,
    HAS_CAP: tl.constexpr,
    HAS_VALID: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,  # D padded to a power of two
    BLOCK: tl.constexpr,
):
    """One program per (b, h, g) and block of queries: online log-sum-exp over the keys they see."""
    bhg = tl.program_id(1).to(tl.int64)  # int64: bhg * Q * D passes 2**31
    b = bhg // G // n_heads
    h = bhg // G % n_heads
    d = tl.arange(0, DP)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = n_keys - n_queries + i
    row = bhg * n_queries + i
    q = tl.load(q_ptr + row[:, None] * D + d[None, :], mask=(i < n_queries)[:, None] & (d < D)[None, :], other=0.0)
    m = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    stop = tl.minimum(n_keys, n_keys - n_queries + (tl.program_id(0) + 1) * BLOCK)
    for start in range(0, stop, BLOCK):
        n = start + tl.arange(0, BLOCK)
        live = n < n_keys
        if HAS_VALID:
            live = live & (tl.load(valid_ptr + b * n_keys + n, mask=live, other=0) != 0)
        column = k_ptr + b * stride_kb + h * stride_kh + n.to(tl.int64)[:, None] * stride_kn + d[None, :]
        k = tl.load(column, mask=live[:, None] & (d < D)[None, :], other=0.0)
        s = _tile(q, k, live[None, :] & (n[None, :] <= at[:, None]), scale, softcap, HAS_CAP)
        m_new = tl.maximum(m, tl.max(s, 1))
        # An empty prefix keeps m at -inf; shift by 0 there so exp2 never sees inf - inf.
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        total = total * tl.exp2(m - m_safe) + tl.sum(tl.exp2(s - m_safe[:, None]), 1)
        m = m_new
    counts = total > 0.0
    if HAS_VALID:
        counts = counts & (tl.load(valid_ptr + b * n_keys + at, mask=i < n_queries, other=0) != 0)
    lse = tl.where(counts, m + tl.log2(tl.where(total > 0.0, total, 1.0)), float("inf"))
    tl.store(lse_ptr + row, lse, mask=i < n_queries)


@triton.jit
def _sums_kernel(
    q_ptr,  # [B, H, G, Q, D]
    k_ptr,  # [B, H, N, D]
    valid_ptr,  # [B, N] int8
    lse_ptr,  # [B, H, G, Q] float32, of `_lse_kernel`
    sums_ptr,  # [B, H, N] float32
    n_heads,  # H
    n_queries,  # Q
    n_keys,  # N
    stride_kb,
    stride_kh,
    stride_kn,
    scale,
    softcap,
    HAS_CAP: tl.constexpr,
    HAS_VALID: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program per (b, h) and block of keys: the weights they get from every query behind them."""
    bh = tl.program_id(1).to(tl.int64)
    b = bh // n_heads
    h = bh % n_heads
    d = tl.arange(0, DP)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = n < n_keys
    if HAS_VALID:
        live = live & (tl.load(valid_ptr + b * n_keys + n, mask=live, other=0) != 0)
    column = k_ptr + b * stride_kb + h * stride_kh + n.to(tl.int64)[:, None] * stride_kn + d[None, :]
    k = tl.load(column, mask=live[:, None] & (d < D)[None, :], other=0.0)
    first = tl.maximum(tl.program_id(0) * BLOCK - (n_keys - n_queries), 0) // BLOCK * BLOCK
    acc = tl.zeros([BLOCK], tl.float32)
    for g in range(G):
        for start in range(first, n_queries, BLOCK):
            i = start + tl.arange(0, BLOCK)
            row = (bh * G + g) * n_queries + i
            inside = i < n_queries
            q = tl.load(q_ptr + row[:, None] * D + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0)
            lse = tl.load(lse_ptr + row, mask=inside, other=float("inf"))
            seen = live[None, :] & (n[None, :] <= (n_keys - n_queries + i)[:, None])
            s = _tile(q, k, seen, scale, softcap, HAS_CAP)
            acc += tl.sum(tl.exp2(s - lse[:, None]), 0)
    tl.store(sums_ptr + bh * n_keys + n, acc, mask=n < n_keys)


def attention_sums(
    query: torch.Tensor, keys: torch.Tensor, valid: torch.Tensor | None, scale: float, softcap: float | None
) -> torch.Tensor:
    """Sum the causal softmax weights of each key over queries and group. Enqueued on the current stream.

    Parameters
    ----------
    query : torch.Tensor
        (B, H, G, Q, D), of the last Q of N positions; float32, float16 or bfloat16.
    keys : torch.Tensor
        (B, H, N, D) of the same type, channels contiguous.
    valid : torch.Tensor or None
        Bool (B, N): positions that hold a token; None: all.
    scale, softcap : float, float or None
        Of the logits.

    Returns
    -------
    torch.Tensor
        float32 (B, H, N).

    Raises
    ------
    ValueError
        If the shapes or types do not fit each other.
    """
    b, h, group, n_queries, d = query.shape
    n_keys = keys.shape[2]
    if keys.shape != (b, h, n_keys, d) or keys.dtype != query.dtype or not 1 <= n_queries <= n_keys:
        msg = f"query {tuple(query.shape)} {query.dtype} does not fit keys {tuple(keys.shape)} {keys.dtype}"
        raise ValueError(msg)
    query = query.contiguous()
    keys = keys if keys.stride(3) == 1 else keys.contiguous()
    sums = torch.empty(b, h, n_keys, dtype=torch.float32, device=keys.device)
    lse = torch.empty(b, h, group, n_queries, dtype=torch.float32, device=keys.device)
    flags = sums if valid is None else valid.to(torch.int8).contiguous()
    block = BLOCK if d * query.element_size() <= WIDE_BYTES else BLOCK // 2
    sizes = (h, n_queries, n_keys, *keys.stride()[:3], scale, 0.0 if softcap is None else softcap)
    constants = {
        "HAS_CAP": softcap is not None,
        "HAS_VALID": valid is not None,
        "G": group,
        "D": d,
        "DP": max(16, triton.next_power_of_2(d)),
        "BLOCK": block,
    }
    _lse_kernel[(triton.cdiv(n_queries, block), b * h * group)](query, keys, flags, lse, *sizes, **constants)
    _sums_kernel[(triton.cdiv(n_keys, block), b * h)](query, keys, flags, lse, sums, *sizes, **constants)
    return sums


def attention_sums_ref(
    query: torch.Tensor,
    keys: torch.Tensor,
    valid: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """Compute the same as one softmax over the whole matrix, in `dtype`."""
    n_queries, n_keys = query.shape[3], keys.shape[2]
    logits = query.to(dtype) @ keys.to(dtype)[:, :, None].transpose(-1, -2) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    seen = torch.ones(n_queries, n_keys, dtype=torch.bool, device=keys.device).tril(n_keys - n_queries)
    if valid is not None:
        seen = seen & valid[:, None] & valid[:, n_keys - n_queries :, None]
        seen = seen[:, None, None]
    return torch.softmax(logits.masked_fill(~seen, float("-inf")), -1).nan_to_num(0.0).sum((2, 3))
