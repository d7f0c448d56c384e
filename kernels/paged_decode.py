"""Attention of one decoded token over the tokens near it (sink, window) and over pages read by their address.

Dimension key: B sequences, H KV heads, G query heads per KV head, D key dim, E value dim, C columns of the near buffer,
K places in the page table, S splits of the tokens, P = 16 tokens in a page.

    out[b, h, g] = sum_i p_i v_i,   p = softmax(logit)                over the live tokens i, near and paged
    lse[b, h, g] = log sum_i exp(logit_i)                             natural logarithm
    logit_i      = scale * q[b, h, g] . k_i, through cap * tanh(. / cap) if there is a soft cap

Pages that are not read may be estimated: with the log-sum-exps of all and of the chosen pages and the output that the
others would give, they count as one more token of logit ``log(exp(all) - exp(chosen))`` and that value.

A head without a single live token gets out = 0 and lse = -inf, so that it drops out of a merge by log-sum-exp.

A page is named by one int64 word: its address in the low 48 bits, bit ``48 + s`` set if slot ``s`` is live; 0 is no
page. Pages start on 64 bytes. The memory may be the device's or registered host memory, which the kernel then reads
over the bus: no copy and no processor in between. Each split writes a
partial result; `merge_splits` folds them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from icecache.kernels.merge_splits import merge_splits

PAGE_TOKENS = 16
NEAR_BLOCK = 64
"""Near tokens loaded at a time; 16 where a key has more than `WIDE_BYTES`, or they overflow the shared memory."""
WIDE_BYTES = 512
MIN_PROGRAMS = 512
"""A long near part is cut so that there are at least so many programs, about 4 on each processor of a large device; a
short one (a sink and a window) is one program a head, which ends before the first page has crossed the bus."""
MAX_PAGE_SPLITS = 64
"""Programs per head over the page table. One page a program hides the latency of the bus best; more partial results
than this cost more to merge than they hide (benches/python/bench_paged_decode.py)."""


@triton.jit
def _fold(q, k, v, live, scale, softcap, m, denominator, acc, HAS_CAP: tl.constexpr):
    """Fold some tokens into a running softmax in base 2: maximum, denominator and numerator."""
    # ieee: float32 keys must not be rounded to tf32 on the tensor cores
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # [G, tokens]
    if HAS_CAP:
        s = softcap * (2.0 * tl.sigmoid(2.0 * s / softcap) - 1.0)
    s = tl.where(live[None, :], s * 1.4426950408889634, float("-inf"))  # log2(e)
    m_new = tl.maximum(m, tl.max(s, 1))
    # An empty prefix keeps m at -inf; shift by 0 there so exp2 never sees inf - inf.
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(s - m_safe[:, None])
    rescale = tl.exp2(m - m_safe)
    denominator = denominator * rescale + tl.sum(p, 1)
    acc = acc * rescale[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
    return m_new, denominator, acc


@triton.jit
def _paged_decode_kernel(
    q_ptr,  # [B, H, G, D]
    near_k_ptr,  # [B, H, C, D]
    near_v_ptr,  # [B, H, C, E]
    bounds_ptr,  # [B, 3] int32: columns 0 .. sink and start .. stop of the near buffer are live
    table_ptr,  # [B, H, K] int64, see the module docstring
    unread_lse_ptr,  # [B, H, G, 2] float32; may be registered host memory
    unread_out_ptr,  # [B, H, G, E] float32
    out_ptr,  # [B, H, S, G, E] float32
    lse_ptr,  # [B, H, S, G] float32, natural logarithm
    n_heads,  # H
    n_places,  # K
    n_near_splits,
    pages_per_split,
    stride_kb,
    stride_kh,
    stride_kc,
    stride_vb,
    stride_vh,
    stride_vc,
    scale,
    softcap,
    HAS_CAP: tl.constexpr,
    HAS_UNREAD: tl.constexpr,  # the last split is the estimate
    K_OFFSET: tl.constexpr,  # elements from a page's address to its first key; constants, so that loads are wide
    K_ROW: tl.constexpr,  # elements from key to key
    V_OFFSET: tl.constexpr,
    V_ROW: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,  # G padded to what tl.dot accepts
    D: tl.constexpr,
    DP: tl.constexpr,  # D padded to a power of two
    E: tl.constexpr,
    EP: tl.constexpr,
    P: tl.constexpr,
    NB: tl.constexpr,  # near tokens loaded at a time
):
    """One program per (sequence and KV head, split). Online softmax in base 2, accumulated in float32."""
    bh = tl.program_id(0).to(tl.int64)  # int64: bh * strides pass 2**31 for big batches
    split = tl.program_id(1)
    n_splits = tl.num_programs(1)
    b = bh // n_heads
    h = bh % n_heads
    g = tl.arange(0, GP)
    d = tl.arange(0, DP)
    e = tl.arange(0, EP)
    t = tl.arange(0, P)
    n = tl.arange(0, NB)
    element = q_ptr.dtype.element_ty
    q = tl.load(q_ptr + (bh * G + g)[:, None] * D + d[None, :], mask=(g < G)[:, None] & (d < D)[None, :], other=0.0)
    sink = tl.load(bounds_ptr + b * 3)
    start = tl.load(bounds_ptr + b * 3 + 1)
    n_near = sink + tl.load(bounds_ptr + b * 3 + 2) - start
    n_blocks = (n_near + NB - 1) // NB
    blocks_per_split = (n_blocks + n_near_splits - 1) // n_near_splits

    m = tl.full([GP], float("-inf"), tl.float32)
    denominator = tl.zeros([GP], tl.float32)
    acc = tl.zeros([GP, EP], tl.float32)
    # Every split runs one of the two loops; for the other, its range is empty.
    first = split * blocks_per_split
    for i in range(first, tl.minimum(n_blocks, first + blocks_per_split)):
        index = i * NB + n
        live = index < n_near
        column = tl.where(index < sink, index, index - sink + start).to(tl.int64)
        k_ptr = near_k_ptr + b * stride_kb + h * stride_kh + column[:, None] * stride_kc + d[None, :]
        v_ptr = near_v_ptr + b * stride_vb + h * stride_vh + column[:, None] * stride_vc + e[None, :]
        k = tl.load(k_ptr, mask=live[:, None] & (d < D)[None, :], other=0.0)  # [NB, D]
        v = tl.load(v_ptr, mask=live[:, None] & (e < E)[None, :], other=0.0)  # [NB, E]
        m, denominator, acc = _fold(q, k, v, live, scale, softcap, m, denominator, acc, HAS_CAP)
    first = (split - n_near_splits) * pages_per_split
    for i in range(tl.maximum(first, 0), tl.where(first < 0, 0, tl.minimum(n_places, first + pages_per_split))):
        word = tl.load(table_ptr + bh * n_places + i)
        live = ((word >> (t + 48).to(tl.int64)) & 1) != 0
        page = (word & 0xFFFFFFFFFFFF).to(tl.pointer_type(element))
        page = tl.multiple_of(page, 16)  # or every element is loaded by itself
        k_ptr = page + K_OFFSET + t[:, None] * K_ROW + d[None, :]
        v_ptr = page + V_OFFSET + t[:, None] * V_ROW + e[None, :]
        k = tl.load(k_ptr, mask=live[:, None] & (d < D)[None, :], other=0.0)
        v = tl.load(v_ptr, mask=live[:, None] & (e < E)[None, :], other=0.0)
        m, denominator, acc = _fold(q, k, v, live, scale, softcap, m, denominator, acc, HAS_CAP)

    safe = tl.where(denominator == 0.0, 1.0, denominator)
    lse = tl.where(denominator == 0.0, float("-inf"), (m + tl.log2(safe)) / 1.4426950408889634)
    out = acc / safe[:, None]
    if HAS_UNREAD:
        last = 0 * g + split == n_splits - 1  # [GP]
        pair_ptr = unread_lse_ptr + (bh * G + g) * 2
        total = tl.load(pair_ptr, mask=last & (g < G), other=float("-inf"))
        chosen = tl.load(pair_ptr + 1, mask=last & (g < G), other=float("-inf"))
        known = total != float("-inf")  # or the difference below is not a number
        rest = tl.log(1.0 - tl.exp(tl.minimum(tl.where(known, chosen - total, 0.0), 0.0)))
        lse = tl.where(last, tl.where(known, total + rest, total), lse)
        estimate_ptr = unread_out_ptr + (bh * G + g)[:, None] * E + e[None, :]
        # The last split has read no token, the others read no estimate.
        out += tl.load(estimate_ptr, mask=(last & (g < G))[:, None] & (e < E)[None, :], other=0.0)
    row = (bh * n_splits + split) * G + g
    tl.store(out_ptr + row[:, None] * E + e[None, :], out, mask=(g < G)[:, None] & (e < E)[None, :])
    tl.store(lse_ptr + row, lse, mask=g < G)


@torch.library.custom_op("icecache::paged_decode_splits", mutates_args=())
def _paged_decode_splits(
    q: torch.Tensor,
    near_keys: torch.Tensor,
    near_values: torch.Tensor,
    bounds: torch.Tensor,
    table: torch.Tensor,
    scale: float,
    softcap: float,
    page_strides: list[int],
    near_splits: int,
    page_splits: int,
    num_warps: int,
    unread_lse: torch.Tensor | None,
    unread_out: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    b, h, g, d = q.shape
    value_dim, n_places = near_values.shape[3], table.shape[2]
    splits = near_splits + page_splits + (unread_lse is not None)
    out = torch.empty(b, h, splits, g, value_dim, dtype=torch.float32, device=q.device)
    lse = torch.empty(b, h, splits, g, dtype=torch.float32, device=q.device)
    k_offset, k_row, v_offset, v_row = page_strides
    _paged_decode_kernel[(b * h, splits)](
        q,
        near_keys,
        near_values,
        bounds,
        table,
        q if unread_lse is None else unread_lse,  # something that is there: it is not looked at
        q if unread_out is None else unread_out,
        out,
        lse,
        h,
        n_places,
        near_splits,
        triton.cdiv(n_places, max(page_splits, 1)),
        *near_keys.stride()[:3],
        *near_values.stride()[:3],
        scale,
        softcap,
        HAS_CAP=softcap > 0.0,
        HAS_UNREAD=unread_lse is not None,
        K_OFFSET=k_offset,
        K_ROW=k_row,
        V_OFFSET=v_offset,
        V_ROW=v_row,
        G=g,
        GP=max(16, triton.next_power_of_2(g)),
        D=d,
        DP=max(16, triton.next_power_of_2(d)),
        E=value_dim,
        EP=max(16, triton.next_power_of_2(value_dim)),
        P=PAGE_TOKENS,
        NB=_near_block(q, near_values),
        num_warps=num_warps,
    )
    return out, lse


def _near_block(q: torch.Tensor, near_values: torch.Tensor) -> int:
    return NEAR_BLOCK if max(q.shape[3], near_values.shape[3]) * q.element_size() <= WIDE_BYTES else 16


@_paged_decode_splits.register_fake
def _(
    q: torch.Tensor,
    near_keys: torch.Tensor,
    near_values: torch.Tensor,
    bounds: torch.Tensor,
    table: torch.Tensor,
    scale: float,
    softcap: float,
    page_strides: list[int],
    near_splits: int,
    page_splits: int,
    num_warps: int,
    unread_lse: torch.Tensor | None,
    unread_out: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    b, h, g, _ = q.shape
    shape = (b, h, near_splits + page_splits + (unread_lse is not None), g)
    return q.new_empty(*shape, near_values.shape[3], dtype=torch.float32), q.new_empty(*shape, dtype=torch.float32)


def paged_decode(
    q: torch.Tensor,
    near_keys: torch.Tensor,
    near_values: torch.Tensor,
    bounds: torch.Tensor,
    table: torch.Tensor,
    scale: float,
    *,
    softcap: float | None = None,
    page_strides: tuple[int, int, int, int] | None = None,
    page_splits: int | None = None,
    num_warps: int = 4,
    unread: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to near tokens and pages; see the module docstring for the formula.

    Parameters
    ----------
    q : torch.Tensor
        ``(B, H, G, D)``, contiguous; float32, float16 or bfloat16.
    near_keys, near_values : torch.Tensor
        ``(B, H, C, D)`` and ``(B, H, C, E)``, dtype and device of `q`, last dimension contiguous.
    bounds : torch.Tensor
        ``(B, 3)`` int32: columns ``0 .. sink`` and ``start .. stop`` of the near buffers are live.
    table : torch.Tensor
        ``(B, H, K)`` int64 words, see the module docstring; K may be 0.
    scale : float
        Factor on the logits, usually ``D ** -0.5``.
    softcap : float, optional
        ``softcap * tanh(logit / softcap)``.
    page_strides : tuple of int, optional
        Elements from the address of a page to its first key, from key to key, to its first value, and from value to
        value. Default: 16 keys, then 16 values.
    page_splits : int, optional
        Programs that share the table of one head. Default: one a place, at most `MAX_PAGE_SPLITS`.
    unread : tuple of torch.Tensor, optional
        Estimate of what is not read: ``(B, H, G, 2)`` float32, log-sum-exp of the logits of all pages and of those in
        the table (may be registered host memory), and ``(B, H, G, E)`` float32, what the others would give. Contiguous.

    Returns
    -------
    out : torch.Tensor
        ``(B, H, G, E)`` in the dtype of `q`.
    lse : torch.Tensor
        ``(B, H, G)`` float32, natural logarithm, the estimate included; ``-inf`` where nothing was attended.

    Raises
    ------
    ValueError
        If a shape, dtype or memory layout differs from the above.

    Notes
    -----
    Asynchronous: runs on the current stream of the device of `q`, may be captured in a CUDA graph. The addresses are
    not checked: whoever fills the table answers for them.
    """
    _check(q, near_keys, near_values, bounds, table)
    if unread is not None:
        _check_unread(q, near_values.shape[3], *unread)
    n_places, n_columns = table.shape[2], near_keys.shape[2]
    splits = min(n_places, MAX_PAGE_SPLITS) if page_splits is None else min(page_splits, n_places)
    near_blocks = triton.cdiv(max(n_columns, 1), _near_block(q, near_values))
    near_splits = 1 if near_blocks <= 4 else min(near_blocks, triton.cdiv(MIN_PROGRAMS, q.shape[0] * q.shape[1]))
    d, value_dim = q.shape[3], near_values.shape[3]
    strides = page_strides or (0, d, PAGE_TOKENS * d, value_dim)
    out, lse = _paged_decode_splits(
        q,
        near_keys,
        near_values,
        bounds,
        table,
        scale,
        softcap or 0.0,
        list(strides),
        near_splits,
        splits,
        num_warps,
        *(unread or (None, None)),
    )
    return merge_splits(out, lse, q.dtype)


def page_words(pages: torch.Tensor, table: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Words that name pages of a tensor.

    Parameters
    ----------
    pages : torch.Tensor
        ``(N, 2, P, D)``, contiguous. Must outlive the use of the words.
    table, counts : torch.Tensor
        ``(B, H, K)`` integers: page of each place (-1 = none) and its live tokens, first slots first.

    Returns
    -------
    torch.Tensor
        ``(B, H, K)`` int64 on the device of `table`.
    """
    address = pages.data_ptr() + table.long() * (pages[0].numel() * pages.element_size())
    live = (1 << counts.long()) - 1
    # The 16th slot lands in the sign bit; shifting an int64 keeps it.
    return torch.where((table >= 0) & (counts > 0), (live << 48) | address, 0)


def paged_decode_ref(
    q: torch.Tensor,
    near: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    paged: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    scale: float,
    *,
    softcap: float | None = None,
    unread: tuple[torch.Tensor, torch.Tensor] | None = None,
    dtype: torch.dtype = torch.float64,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain torch version of `paged_decode`, computed in `dtype`.

    Parameters
    ----------
    near : tuple of torch.Tensor
        Keys, values and bounds, as for `paged_decode`.
    paged : tuple of torch.Tensor
        ``pages, table, counts``, as for `page_words`.
    """
    near_keys, near_values, bounds = near
    pages, table, counts = paged
    b, h, _g, d = q.shape
    column = torch.arange(near_keys.shape[2], device=q.device)
    bounds = bounds.to(q.device).long()[:, :, None]
    near_live = (column < bounds[:, 0]) | ((column >= bounds[:, 1]) & (column < bounds[:, 2]))  # [B, C]
    picked = pages.to(q.device)[table.clamp(min=0).long()].to(dtype)  # [B, H, K, 2, P, D]
    keys, values = (picked[..., half, :, :].reshape(b, h, -1, d) for half in (0, 1))
    slot = torch.arange(pages.shape[2], device=q.device)
    page_live = (slot < torch.where(table >= 0, counts, 0).unsqueeze(-1)).reshape(b, h, -1)
    keys = torch.cat([near_keys.to(dtype), keys], 2)
    values = torch.cat([near_values.to(dtype), values], 2)
    live = torch.cat([near_live[:, None].expand(b, h, -1), page_live], 2)[:, :, None]
    logits = q.to(dtype) @ keys.transpose(-1, -2) * scale  # [B, H, G, C + K * P]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.masked_fill(~live, float("-inf"))
    values = torch.where(live.transpose(-1, -2), values, 0.0)  # a dead slot may hold anything, and 0 * inf is NaN
    if unread is not None:
        total, chosen = unread[0].to(q.device, dtype).unbind(-1)
        logits = torch.cat([logits, (total.exp() - chosen.exp()).clamp(min=0.0).log()[..., None]], -1)
        weights = torch.softmax(logits, -1).nan_to_num(0.0)
        return weights[..., :-1] @ values + weights[..., -1:] * unread[1].to(dtype), torch.logsumexp(logits, -1)
    return torch.softmax(logits, -1).nan_to_num(0.0) @ values, torch.logsumexp(logits, -1)


def _check_unread(q: torch.Tensor, value_dim: int, lse: torch.Tensor, out: torch.Tensor) -> None:
    b, h, g, _ = q.shape
    for name, tensor, shape in (("lse", lse, (b, h, g, 2)), ("out", out, (b, h, g, value_dim))):
        if tuple(tensor.shape) != shape or tensor.dtype != torch.float32 or not tensor.is_contiguous():
            msg = f"unread {name}: expected contiguous float32 {shape}, got {tuple(tensor.shape)} {tensor.dtype}"
            raise ValueError(msg)


def _check(
    q: torch.Tensor, near_keys: torch.Tensor, near_values: torch.Tensor, bounds: torch.Tensor, table: torch.Tensor
) -> None:
    if q.dim() != 4 or not q.is_contiguous():
        msg = f"q: expected a contiguous (B, H, G, D) tensor, got {tuple(q.shape)}, strides {q.stride()}"
        raise ValueError(msg)
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        msg = f"q: expected float32, float16 or bfloat16, got {q.dtype}"
        raise ValueError(msg)
    b, h, _, d = q.shape
    for name, tensor, dim in (("near_keys", near_keys, d), ("near_values", near_values, None)):
        fits = tensor.dim() == 4 and tensor.shape[:2] == (b, h) and (dim is None or tensor.shape[3] == dim)
        if not fits or tensor.stride(3) != 1 or tensor.dtype != q.dtype or tensor.device != q.device:
            msg = (
                f"{name}: expected ({b}, {h}, C, {'E' if dim is None else dim}) of {q.dtype} on {q.device}, last "
                f"dimension contiguous, got {tuple(tensor.shape)} of {tensor.dtype} on {tensor.device}"
            )
            raise ValueError(msg)
    if near_values.shape[2] != near_keys.shape[2]:
        msg = f"near_values: expected {near_keys.shape[2]} columns like near_keys, got {near_values.shape[2]}"
        raise ValueError(msg)
    if tuple(bounds.shape) != (b, 3) or bounds.dtype != torch.int32 or not bounds.is_contiguous():
        msg = f"bounds: expected a contiguous ({b}, 3) int32 tensor, got {tuple(bounds.shape)} {bounds.dtype}"
        raise ValueError(msg)
    if table.dim() != 3 or table.shape[:2] != (b, h) or table.dtype != torch.int64 or not table.is_contiguous():
        msg = f"table: expected a contiguous ({b}, {h}, K) int64 tensor, got {tuple(table.shape)} {table.dtype}"
        raise ValueError(msg)
    for name, tensor in (("bounds", bounds), ("table", table)):
        if tensor.device != q.device:
            msg = f"{name}: expected on {q.device}, got {tensor.device}"
            raise ValueError(msg)
