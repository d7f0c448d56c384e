"""Live tokens of pages, read where the pages lie and written one behind the other.

Dimension key: H KV heads, N pages of all heads (head after head), T tokens of a piece, D key dim, E value dim,
P = 16 tokens in a page.

    keys[h, t - first] = key of live token t of head h, values likewise,   first <= t < first + T

Token t of a head is counted over the live slots of its pages, in their order. So every head of a sequence has the same
tokens, whatever its pages look like, and attention over a piece needs no mask.

The memory is host memory as a rule, read over the bus while another stream computes. Few programs do it, each with many
reads under way: they hide the latency of the bus, and leave the processors to whoever computes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

PAGE_TOKENS = 16
PROGRAMS = 8
"""Programs in all, if there are not more heads. With 8 to 64 of them 32,768 tokens of 8 heads of 128 come at 48 to 49
GB/s, a plain copy at 55 (H200, benches/results/chunks-h200), and each takes a processor from attention beside it."""
PAGES_AT_ONCE = 8
"""Pages that a program reads at a time, 64 KiB of keys and values for heads of 128 in bfloat16."""


@triton.jit
def _page_gather_kernel(
    words_ptr,  # [N] int64: address, and in the upper 16 bits the live slots; see `paged_decode`
    starts_ptr,  # [N] int32: live tokens of the same head before this page
    spans_ptr,  # [H, 2] int32: pages of each head that hold tokens of the piece
    keys_ptr,  # [H, T, D]
    values_ptr,  # [H, T, E]
    first,
    n_tokens,  # T
    stride_kh,
    stride_kt,
    stride_vh,
    stride_vt,
    K_OFFSET: tl.constexpr,  # as in `paged_decode`
    K_ROW: tl.constexpr,
    V_OFFSET: tl.constexpr,
    V_ROW: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
    P: tl.constexpr,
    PB: tl.constexpr,  # pages at a time
):
    """One program per (share of the pages, head)."""
    lane = tl.program_id(0)
    h = tl.program_id(1).to(tl.int64)
    element = keys_ptr.dtype.element_ty
    row = tl.arange(0, PB * P)
    slot = row % P
    d = tl.arange(0, DP)
    e = tl.arange(0, EP)
    stop = tl.load(spans_ptr + h * 2 + 1)
    for i in range(tl.load(spans_ptr + h * 2) + lane * PB, stop, tl.num_programs(0) * PB):
        index = i + row // P
        word = tl.load(words_ptr + index, mask=index < stop, other=0)
        bits = ((word >> 48) & 0xFFFF).to(tl.int32)
        live = ((bits >> slot) & 1) != 0
        # Live slots before this one: bits counted in pairs, nibbles, bytes.
        n = bits & ((1 << slot) - 1)
        n = n - ((n >> 1) & 0x5555)
        n = (n & 0x3333) + ((n >> 2) & 0x3333)
        n = (n + (n >> 4)) & 0x0F0F
        n = (n + (n >> 8)) & 0x1F
        token = tl.load(starts_ptr + index, mask=index < stop, other=0) + n - first
        live = live & (token >= 0) & (token < n_tokens)
        page = (word & 0xFFFFFFFFFFFF).to(tl.pointer_type(element))
        page = tl.multiple_of(page, 16)  # or every element is loaded by itself
        k_from = page[:, None] + K_OFFSET + slot[:, None] * K_ROW + d[None, :]
        v_from = page[:, None] + V_OFFSET + slot[:, None] * V_ROW + e[None, :]
        k = tl.load(k_from, mask=live[:, None] & (d < D)[None, :])  # [PB * P, DP]
        v = tl.load(v_from, mask=live[:, None] & (e < E)[None, :])
        token = token.to(tl.int64)
        k_to = keys_ptr + h * stride_kh + token[:, None] * stride_kt + d[None, :]
        v_to = values_ptr + h * stride_vh + token[:, None] * stride_vt + e[None, :]
        tl.store(k_to, k, mask=live[:, None] & (d < D)[None, :])
        tl.store(v_to, v, mask=live[:, None] & (e < E)[None, :])


@torch.library.custom_op("icecache::page_gather", mutates_args=("keys", "values"))
def _page_gather(
    words: torch.Tensor,
    starts: torch.Tensor,
    spans: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    first: int,
    page_strides: list[int],
    programs: int,
    pages_at_once: int,
    num_warps: int,
) -> None:
    h, n_tokens, d = keys.shape
    value_dim = values.shape[2]
    k_offset, k_row, v_offset, v_row = page_strides
    _page_gather_kernel[(triton.cdiv(programs, h), h)](
        words,
        starts,
        spans,
        keys,
        values,
        first,
        n_tokens,
        *keys.stride()[:2],
        *values.stride()[:2],
        K_OFFSET=k_offset,
        K_ROW=k_row,
        V_OFFSET=v_offset,
        V_ROW=v_row,
        D=d,
        DP=triton.next_power_of_2(d),
        E=value_dim,
        EP=triton.next_power_of_2(value_dim),
        P=PAGE_TOKENS,
        PB=pages_at_once,
        num_warps=num_warps,
    )


@_page_gather.register_fake
def _(
    words: torch.Tensor,
    starts: torch.Tensor,
    spans: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    first: int,
    page_strides: list[int],
    programs: int,
    pages_at_once: int,
    num_warps: int,
) -> None:
    return None


def page_gather(
    words: torch.Tensor,
    starts: torch.Tensor,
    spans: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    first: int,
    *,
    page_strides: tuple[int, int, int, int] | None = None,
    programs: int | None = None,
    pages_at_once: int = PAGES_AT_ONCE,
    num_warps: int = 16,
) -> None:
    """Write live tokens ``first .. first + T`` of every head to `keys` and `values`.

    Parameters
    ----------
    words : torch.Tensor
        ``(N,)`` int64, see :mod:`icecache.kernels.paged_decode`; on the device of `keys`.
    starts : torch.Tensor
        ``(N,)`` int32: live tokens of the same head in the pages before.
    spans : torch.Tensor
        ``(H, 2)`` int32: first page of each head that holds such a token, and the one behind the last.
    keys, values : torch.Tensor
        ``(H, T, D)`` and ``(H, T, E)`` to write, of one dtype, last dimension contiguous.
    page_strides : tuple of int, optional
        As in :func:`icecache.kernels.paged_decode.paged_decode`.
    programs : int, optional
        Programs in all, one a head at least. Default: `PROGRAMS`.

    Raises
    ------
    ValueError
        If a shape, dtype or memory layout differs from the above.

    Notes
    -----
    Asynchronous: runs on the current stream. The addresses are not checked: whoever makes the words answers for them.
    """
    h, n_tokens, d = keys.shape
    for name, tensor, shape, dtype in (
        ("words", words, (words.numel(),), torch.int64),
        ("starts", starts, (words.numel(),), torch.int32),
        ("spans", spans, (h, 2), torch.int32),
        ("values", values, (h, n_tokens, values.shape[-1]), keys.dtype),
    ):
        if tensor.shape != shape or tensor.dtype != dtype or tensor.device != keys.device:
            msg = f"{name}: expected {shape} {dtype} on {keys.device}, got {tuple(tensor.shape)} {tensor.dtype}"
            raise ValueError(msg)
    for name, tensor, last in (("keys", keys, 1), ("values", values, 1), ("words", words, 1), ("spans", spans, 1)):
        if tensor.stride(-1) != last:
            msg = f"{name}: expected a contiguous last dimension, got strides {tensor.stride()}"
            raise ValueError(msg)
    strides = page_strides or (0, d, PAGE_TOKENS * d, values.shape[2])
    n = programs or PROGRAMS
    _page_gather(words, starts, spans, keys, values, first, list(strides), n, pages_at_once, num_warps)


def page_gather_ref(
    pages: torch.Tensor, table: list[list[tuple[int, int]]], first: int, n_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain torch version.

    Parameters
    ----------
    pages : torch.Tensor
        ``(M, 2, P, D)``: keys, then values.
    table : list of lists of (int, int)
        Per head: number of each page, and its live slots as bits.

    Returns
    -------
    torch.Tensor, torch.Tensor
        ``(H, n_tokens, D)`` each.
    """
    heads = []
    for words in table:
        rows = [pages[page, :, slot] for page, live in words for slot in range(PAGE_TOKENS) if live >> slot & 1]
        heads.append(torch.stack(rows[first : first + n_tokens], 1))  # [2, T, D]
    both = torch.stack(heads, 1)
    return both[0], both[1]
