"""Attention of many queries over one part of the keys, folded into what earlier parts gave.

Dimension key: H KV heads, G query heads per KV head, Q queries, N keys, D key dim, E value dim.

    total[h, g, q] = logaddexp(lse[h, g, q], log sum_n exp(logit_n))
    out[h, g, q]  <- exp(lse - total) out + sum_n exp(logit_n - total) v_n,   lse <- total
    logit_n        = scale * q . k_n, through cap * tanh(. / cap) if there is a soft cap

over all keys, or, if causal, over the keys ``n <= q + N - Q``: the queries are the last Q of the N tokens. Without
earlier parts out = 0 and lse = -inf. A query that sees no key keeps what it has. Everything is accumulated in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

WIDE_ROOM = 225 << 10
"""Bytes of shared memory that a block of 128 keys in three stages needs: 539 TFLOP/s on an H200, where blocks of 64
keys reach 442 (benches/results/chunks-h200)."""
NARROW_ROOM = 160 << 10
"""The same for blocks of 64 keys."""


@triton.jit
def _block(
    q, k_ptr, v_ptr, start, n_keys, stride_kn, stride_vn, row, scale, softcap, m, total, acc,
    MASKED: tl.constexpr, HAS_CAP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, E: tl.constexpr, EP: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """Fold keys ``start .. start + BN`` into a running softmax in base 2: maximum, total and numerator."""
    n = start + tl.arange(0, BN)
    d = tl.arange(0, DP)
    e = tl.arange(0, EP)
    k_from = k_ptr + n[None, :].to(tl.int64) * stride_kn + d[:, None]
    v_from = v_ptr + n[:, None].to(tl.int64) * stride_vn + e[None, :]
    # No mask where none is needed: a masked load cannot be pipelined as wide.
    if MASKED or D != DP:
        k = tl.load(k_from, mask=(n < n_keys)[None, :] & (d < D)[:, None], other=0.0)  # [DP, BN]
    else:
        k = tl.load(k_from)
    s = tl.dot(q, k, input_precision="ieee")  # ieee: float32 must not be rounded to tf32
    if HAS_CAP:
        s = softcap * (2.0 * tl.sigmoid(2.0 * s * scale / softcap) - 1.0)
        factor = 1.4426950408889634  # log2(e)
    else:
        factor = scale * 1.4426950408889634
    if MASKED:
        s = tl.where(n[None, :] <= row[:, None], s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * factor)
    # An empty prefix keeps m at -inf; shift by 0 there so exp2 never sees inf - inf.
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new) if MASKED else m_new
    p = tl.exp2(s * factor - m_safe[:, None])
    rescale = tl.exp2(m - m_safe)
    total = total * rescale + tl.sum(p, 1)
    if MASKED or E != EP:
        v = tl.load(v_from, mask=(n < n_keys)[:, None] & (e < E)[None, :], other=0.0)  # [BN, EP]
    else:
        v = tl.load(v_from)
    acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision="ieee")
    return m_new, total, acc


@triton.jit
def _part_attention_kernel(
    q_ptr,  # [H, G, Q, D]
    k_ptr,  # [H, N, D]
    v_ptr,  # [H, N, E]
    out_ptr,  # [H, G, Q, E] float32
    lse_ptr,  # [H, G, Q] float32, natural logarithm
    n_queries,  # Q
    n_keys,  # N
    stride_qh,
    stride_qg,
    stride_qq,
    stride_kh,
    stride_kn,
    stride_vh,
    stride_vn,
    scale,
    softcap,
    CAUSAL: tl.constexpr,
    FOLDS: tl.constexpr,  # whether there are earlier parts
    HAS_CAP: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    BM: tl.constexpr,  # queries of a program
    BN: tl.constexpr,  # keys at a time
):
    """One program per (block of queries, query head)."""
    block = tl.program_id(0)
    if CAUSAL:
        block = tl.num_programs(0) - 1 - block  # the longest first
    hg = tl.program_id(1).to(tl.int64)
    h = hg // G
    g = hg % G
    m_row = block * BM + tl.arange(0, BM)
    d = tl.arange(0, DP)
    e = tl.arange(0, EP)
    there = m_row < n_queries
    q_from = q_ptr + h * stride_qh + g * stride_qg + m_row[:, None].to(tl.int64) * stride_qq + d[None, :]
    q = tl.load(q_from, mask=there[:, None] & (d < D)[None, :], other=0.0)
    k_ptr += h * stride_kh
    v_ptr += h * stride_vh
    m = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, EP], tl.float32)
    if CAUSAL:
        before = n_keys - n_queries  # what every query sees, besides the first of the others
        row = tl.minimum(m_row + before, n_keys - 1)
        stop = tl.maximum(tl.minimum(n_keys, (block + 1) * BM + before), 0)
        whole = tl.maximum(block * BM + before + 1, 0) // BN * BN
    else:
        row = tl.zeros([BM], tl.int32) + n_keys - 1
        stop = n_keys
        whole = n_keys // BN * BN
    for start in tl.range(0, whole, BN):
        m, total, acc = _block(
            q, k_ptr, v_ptr, start, n_keys, stride_kn, stride_vn, row, scale, softcap, m, total, acc,
            False, HAS_CAP, D, DP, E, EP, BN,
        )  # fmt: skip
    for start in tl.range(whole, stop, BN):
        m, total, acc = _block(
            q, k_ptr, v_ptr, start, n_keys, stride_kn, stride_vn, row, scale, softcap, m, total, acc,
            True, HAS_CAP, D, DP, E, EP, BN,
        )  # fmt: skip
    place = hg * n_queries + m_row
    lse = tl.where(total == 0.0, float("-inf"), (m + tl.log2(tl.where(total == 0.0, 1.0, total))) / 1.4426950408889634)
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    out_to = out_ptr + place[:, None] * E + e[None, :]
    mask = there[:, None] & (e < E)[None, :]
    if FOLDS:
        old = tl.load(lse_ptr + place, mask=there, other=float("-inf"))
        top = tl.maximum(old, lse)
        top = tl.where(top == float("-inf"), 0.0, top)
        a = tl.exp(old - top)
        b = tl.exp(lse - top)
        both = a + b
        safe = tl.where(both == 0.0, 1.0, both)
        lse = tl.where(both == 0.0, float("-inf"), top + tl.log(safe))
        acc = (a / safe)[:, None] * tl.load(out_to, mask=mask, other=0.0) + (b / safe)[:, None] * acc
    tl.store(out_to, acc, mask=mask)
    tl.store(lse_ptr + place, lse, mask=there)


@torch.library.custom_op("icecache::part_attention", mutates_args=("out", "lse"))
def _part_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    softcap: float,
    causal: bool,
    folds: bool,
    tile: list[int],
) -> None:
    h, g, n_queries, d = q.shape
    value_dim = values.shape[2]
    block_queries, block_keys, num_warps, num_stages = tile
    _part_attention_kernel[(triton.cdiv(n_queries, block_queries), h * g)](
        q,
        keys,
        values,
        out,
        lse,
        n_queries,
        keys.shape[1],
        *q.stride()[:3],
        *keys.stride()[:2],
        *values.stride()[:2],
        scale,
        softcap,
        CAUSAL=causal,
        FOLDS=folds,
        HAS_CAP=softcap > 0.0,
        G=g,
        D=d,
        DP=max(16, triton.next_power_of_2(d)),
        E=value_dim,
        EP=max(16, triton.next_power_of_2(value_dim)),
        BM=block_queries,
        BN=block_keys,
        num_warps=num_warps,
        num_stages=num_stages,
    )


@_part_attention.register_fake
def _(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    softcap: float,
    causal: bool,
    folds: bool,
    tile: list[int],
) -> None:
    return None


def default_tile(q: torch.Tensor, value_dim: int, causal: bool) -> tuple[int, int, int, int]:
    """Give queries and keys of a block, warps, and stages; benches/python/bench_chunk_attention.py sweeps them."""
    dim = max(triton.next_power_of_2(q.shape[3]), triton.next_power_of_2(value_dim))
    if q.dtype == torch.float32:
        return (32, 32, 4, 1) if dim <= 128 else (16, 16, 4, 1)
    room = torch.cuda.get_device_properties(q.device).shared_memory_per_block_optin if q.is_cuda else 0
    if dim <= 128 and room >= WIDE_ROOM:
        return (128, 64, 8, 3) if causal else (128, 128, 8, 3)
    if room >= NARROW_ROOM:
        return (128, 64, 8, 3) if dim <= 128 else (64, 64, 8, 2)
    return 64, 32, 4, 2


def part_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    *,
    causal: bool = False,
    softcap: float | None = None,
    onto: tuple[torch.Tensor, torch.Tensor] | None = None,
    tile: tuple[int, int, int, int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to one part; see the module docstring.

    Parameters
    ----------
    q : torch.Tensor
        ``(H, G, Q, D)``, float32, float16 or bfloat16, last dimension contiguous.
    keys, values : torch.Tensor
        ``(H, N, D)`` and ``(H, N, E)``, dtype and device of `q`, last dimension contiguous; N >= 1.
    scale : float
        Factor on the logits.
    causal : bool, default=False
        Whether the queries are the last Q of the N tokens and see none behind themselves.
    softcap : float, optional
        ``softcap * tanh(logit / softcap)``.
    onto : tuple of torch.Tensor, optional
        Output and log-sum-exp of earlier parts, which this call replaces in place. None: there are none.
    tile : tuple of int, optional
        See :func:`default_tile`.

    Returns
    -------
    out : torch.Tensor
        ``(H, G, Q, E)`` float32, contiguous.
    lse : torch.Tensor
        ``(H, G, Q)`` float32, natural logarithm; ``-inf`` where nothing was attended.

    Raises
    ------
    ValueError
        If a shape, dtype or memory layout differs from the above.
    """
    _check(q, keys, values)
    out, lse = onto if onto is not None else (None, None)
    if out is None or lse is None:
        shape = (*q.shape[:3], values.shape[2])
        out, lse = (torch.empty(x, dtype=torch.float32, device=q.device) for x in (shape, shape[:3]))
    elif out.shape != (*q.shape[:3], values.shape[2]) or not out.is_contiguous() or not lse.is_contiguous():
        msg = f"onto: expected contiguous {(*q.shape[:3], values.shape[2])}, got {tuple(out.shape)}"
        raise ValueError(msg)
    tiles = list(tile or default_tile(q, values.shape[2], causal))
    _part_attention(q, keys, values, out, lse, scale, softcap or 0.0, causal, onto is not None, tiles)
    return out, lse


def part_attention_ref(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    *,
    causal: bool = False,
    softcap: float | None = None,
    onto: tuple[torch.Tensor, torch.Tensor] | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain torch version of `part_attention`, computed in `dtype`; `onto` is left as it is."""
    n_queries, n_keys = q.shape[2], keys.shape[1]
    logits = q.to(dtype) @ keys[:, None].to(dtype).transpose(-1, -2) * scale  # [H, G, Q, N]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if causal:
        seen = torch.ones(n_queries, n_keys, dtype=torch.bool, device=q.device).tril(n_keys - n_queries)
        logits = logits.masked_fill(~seen, float("-inf"))
    lse = torch.logsumexp(logits, -1)
    out = torch.softmax(logits, -1).nan_to_num(0.0) @ values[:, None].to(dtype)
    if onto is None:
        return out, lse
    before, old = onto[0].to(dtype), onto[1].to(dtype)
    total = torch.logaddexp(old, lse)
    weights = [torch.exp(x - total).nan_to_num(0.0)[..., None] for x in (old, lse)]
    return weights[0] * before + weights[1] * out, total


def _check(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
    if q.dim() != 4 or q.stride(3) != 1 or q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        msg = (
            "q: expected (H, G, Q, D) float32, float16 or bfloat16 with a contiguous last dimension, got "
            f"{tuple(q.shape)} {q.dtype}, strides {q.stride()}"
        )
        raise ValueError(msg)
    h, _, _, d = q.shape
    for name, tensor, dim in (("keys", keys, d), ("values", values, None)):
        wrong = tensor.dim() != 3 or tensor.shape[0] != h or (dim is not None and tensor.shape[2] != dim)
        if wrong or tensor.shape[1] != keys.shape[1] or tensor.shape[1] < 1 or tensor.stride(2) != 1:
            msg = (
                f"{name}: expected ({h}, {keys.shape[1]} >= 1, {dim or 'E'}) with a contiguous last dimension, got "
                f"{tuple(tensor.shape)}, strides {tensor.stride()}"
            )
            raise ValueError(msg)
        if tensor.dtype != q.dtype or tensor.device != q.device:
            msg = f"{name}: expected {q.dtype} on {q.device}, got {tensor.dtype} on {tensor.device}"
            raise ValueError(msg)
