"""Exact log-sum-exp of candidate pages, read where they lie.

Dimension key: U units, N slots of a unit, G query heads per KV head, D key dim, C candidates, T = 16 tokens of a page.

    exact[u, c, g] = log sum_t exp(logit of query g and key t)     over the live tokens of the page in slot chosen[u, c]

Logits are those of `paged_decode`. Places from `counts[u]` on are not written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _page_exact_kernel(
    q_ptr,  # [U, G, D]
    words_ptr,  # [U, N] int64
    chosen_ptr,  # [U, C] int32
    counts_ptr,  # [U] int32
    exact_ptr,  # [U, C, G] float32
    n_slots,  # N
    n_candidates,  # C
    scale,
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
    element = q_ptr.dtype.element_ty
    g = tl.arange(0, GP)
    d = tl.arange(0, DP)
    t = tl.arange(0, T)
    slot = tl.load(chosen_ptr + u * n_candidates + c)
    word = tl.load(words_ptr + u * n_slots + slot)
    live = ((word >> (t + 48).to(tl.int64)) & 1) != 0
    page = (word & 0xFFFFFFFFFFFF).to(tl.pointer_type(element))
    page = tl.multiple_of(page, 16)  # or every element is loaded by itself
    k = tl.load(page + t[:, None] * D + d[None, :], mask=live[:, None] & (d < D)[None, :], other=0.0)  # [T, DP]
    q = tl.load(q_ptr + (u * G + g)[:, None] * D + d[None, :], mask=(g < G)[:, None] & (d < D)[None, :], other=0.0)
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # [GP, T]
    if HAS_CAP:
        s = softcap * (2.0 * tl.sigmoid(2.0 * s / softcap) - 1.0)
    s = tl.where(live[None, :], s, float("-inf"))
    top = tl.max(s, 1)
    lse = top + tl.log(tl.sum(tl.exp(s - top[:, None]), 1))
    tl.store(exact_ptr + (u * n_candidates + c) * G + g, lse, mask=g < G)


@torch.library.custom_op("icecache::page_exact", mutates_args=("exact",))
def _page_exact(
    q: torch.Tensor,
    words: torch.Tensor,
    chosen: torch.Tensor,
    counts: torch.Tensor,
    exact: torch.Tensor,
    scale: float,
    softcap: float,
) -> None:
    units, n_candidates, g = exact.shape
    d = q.shape[-1]
    _page_exact_kernel[(n_candidates, units)](
        q,
        words,
        chosen,
        counts,
        exact,
        words.numel() // units,
        n_candidates,
        scale,
        softcap,
        HAS_CAP=softcap > 0.0,
        G=g,
        GP=max(16, triton.next_power_of_2(g)),
        D=d,
        DP=max(16, triton.next_power_of_2(d)),
        T=16,
        num_warps=2,
    )


@_page_exact.register_fake
def _(
    q: torch.Tensor,
    words: torch.Tensor,
    chosen: torch.Tensor,
    counts: torch.Tensor,
    exact: torch.Tensor,
    scale: float,
    softcap: float,
) -> None:
    return None


def page_exact(
    q: torch.Tensor,
    words: torch.Tensor,
    chosen: torch.Tensor,
    counts: torch.Tensor,
    exact: torch.Tensor,
    scale: float,
    *,
    softcap: float | None = None,
) -> None:
    """Score candidates from their keys; see the module docstring.

    Parameters
    ----------
    q : torch.Tensor
        ``(..., G, D)`` with U units in front, contiguous, of the pages' dtype.
    words : torch.Tensor
        int64 (U * N,); addresses are not checked.
    chosen, counts : torch.Tensor
        int32 (U, C) and (U,), as `page_select` writes them.
    exact : torch.Tensor
        float32 (U, C, G), contiguous; written.
    scale, softcap
        As for `paged_decode`.

    Raises
    ------
    ValueError
        If a shape or dtype differs from the above.
    """
    units, n_candidates, g = exact.shape
    expected = (
        ("q", q.flatten(0, -3), (units, g, q.shape[-1]), q.dtype),
        ("chosen", chosen, (units, n_candidates), torch.int32),
        ("counts", counts, (units,), torch.int32),
        ("exact", exact, (units, n_candidates, g), torch.float32),
    )
    for name, tensor, shape, dtype in expected:
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            msg = f"{name}: expected contiguous {shape} of {dtype}, got {tuple(tensor.shape)} of {tensor.dtype}"
            raise ValueError(msg)
    if words.dtype != torch.int64 or words.dim() != 1 or words.numel() % units:
        msg = f"words: expected int64 ({units} * N,), got {tuple(words.shape)} of {words.dtype}"
        raise ValueError(msg)
    _page_exact(q, words, chosen, counts, exact, scale, softcap or 0.0)


def page_exact_ref(
    q: torch.Tensor, keys: torch.Tensor, live: torch.Tensor, scale: float, *, softcap: float | None = None
) -> torch.Tensor:
    """Log-sum-exp (U, N, G) in float64 of pages (U, N, 16, D) with live tokens (U, N, 16), for queries (U, G, D)."""
    logits = torch.einsum("ugd,untd->ungt", q.double(), keys.double()) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.logsumexp(logits.masked_fill(~live[:, :, None], float("-inf")), -1)
