"""Log-sum-exp of candidate pages, from the keys of the tokens that matter there and the summaries of the others.

Dimension key: U units, N slots of a unit, G query heads per KV head, D key dim, C candidates, T = 16 tokens of a page.

    guess[g, t]    = logit of token t by both bits of its summary, see `page_codes`
    rank of t      = by sum_g exp(guess[g, t] - lse[g]), largest first
    exact[u, c, g] = log sum_t exp(logit of query g and key t if t is among the best `best`, guess[g, t] otherwise)

over the live tokens of the page in slot chosen[u, c]. Keys are read where they lie, over the bus as a rule: of a page
whose sum hangs on a few tokens, a quarter of the bytes says nearly as much as all (docs/LOG.md). Of units with at most
`FEW` candidates all keys are read. Logits of keys are those of `paged_decode`. Places from `counts[u]` on are not
written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from icecache.kernels.page_codes import PAGE_TOKENS, PageCodes
from icecache.kernels.page_refine import summary_logits

FEW = 48
"""Candidates of a unit that are scored from all of their keys."""


@triton.jit
def _page_exact_kernel(
    q_ptr,  # [U, G, D]
    unit_ptr,  # [U, G, D] float16
    length_ptr,  # [U, G] float32
    lse_ptr,  # [U, G] float32
    words_ptr,  # [U, N] int64
    signs_ptr,  # [U, N, D] int16
    fine_ptr,  # [U, N, D] int16
    means_ptr,  # [U, N, D / 2] uint8
    shares_ptr,  # [U, N, 16] uint8
    numbers_ptr,  # [3, ...] float32
    chosen_ptr,  # [U, C] int32
    counts_ptr,  # [U] int32
    exact_ptr,  # [U, C, G] float32
    stride_numbers,
    n_slots,  # N
    n_candidates,  # C
    n_best,
    scale,
    softcap,
    HAS_CAP: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    T: tl.constexpr,
    FEW: tl.constexpr,
):
    """One program per (candidate, unit): many small ones hide the latency of the bus."""
    c = tl.program_id(0)
    u = tl.program_id(1).to(tl.int64)
    count = tl.load(counts_ptr + u)
    if c >= count:
        return
    element = q_ptr.dtype.element_ty
    g = tl.arange(0, GP)
    d = tl.arange(0, DP)
    t = tl.arange(0, T)
    slot = u * n_slots + tl.load(chosen_ptr + u * n_candidates + c)
    word = tl.load(words_ptr + slot)
    live = ((word >> (t + 48).to(tl.int64)) & 1) != 0
    factor = scale * tl.load(length_ptr + u * G + g, mask=g < G, other=0.0)
    guess = summary_logits(
        unit_ptr, factor, signs_ptr, fine_ptr, means_ptr, shares_ptr, numbers_ptr, stride_numbers, u, slot, 0.0,
        softcap, HAS_CAP, G, GP, D, DP, T,
    )  # fmt: skip
    lse = tl.load(lse_ptr + u * G + g, mask=g < G, other=0.0)
    weight = tl.sum(tl.where((g < G)[:, None], tl.exp(guess - lse[:, None]), 0.0), 0)
    weight = tl.where(live, weight, -1.0)
    # Not a number is behind nothing: such a token is read, and its page shows it.
    before = (weight[None, :] > weight[:, None]) | ((weight[None, :] == weight[:, None]) & (t[None, :] < t[:, None]))
    rank = tl.sum(before.to(tl.int32), 1)
    best = live & (rank < tl.where(count <= FEW, T, n_best))
    page = (word & 0xFFFFFFFFFFFF).to(tl.pointer_type(element))
    page = tl.multiple_of(page, 16)  # or every element is loaded by itself
    k = tl.load(page + t[:, None] * D + d[None, :], mask=best[:, None] & (d < D)[None, :], other=0.0)  # [T, DP]
    q = tl.load(q_ptr + (u * G + g)[:, None] * D + d[None, :], mask=(g < G)[:, None] & (d < D)[None, :], other=0.0)
    s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale  # [GP, T]
    if HAS_CAP:
        s = softcap * (2.0 * tl.sigmoid(2.0 * s / softcap) - 1.0)
    s = tl.where(best[None, :], s, tl.where(live[None, :], guess, float("-inf")))
    top = tl.max(s, 1)
    lse = top + tl.log(tl.sum(tl.exp(s - top[:, None]), 1))
    tl.store(exact_ptr + (u * n_candidates + c) * G + g, lse, mask=g < G)


@torch.library.custom_op("icecache::page_exact", mutates_args=("exact",))
def _page_exact(
    q: torch.Tensor,
    unit: torch.Tensor,
    length: torch.Tensor,
    lse: torch.Tensor,
    words: torch.Tensor,
    signs: torch.Tensor,
    fine: torch.Tensor,
    means: torch.Tensor,
    shares: torch.Tensor,
    numbers: torch.Tensor,
    chosen: torch.Tensor,
    counts: torch.Tensor,
    exact: torch.Tensor,
    scale: float,
    softcap: float,
    best: int,
) -> None:
    units, n_candidates, g = exact.shape
    d = q.shape[-1]
    _page_exact_kernel[(n_candidates, units)](
        q,
        unit,
        length,
        lse,
        words,
        signs,
        fine,
        means,
        shares,
        numbers,
        chosen,
        counts,
        exact,
        numbers.stride(0),
        words.numel() // units,
        n_candidates,
        best,
        scale,
        softcap,
        HAS_CAP=softcap > 0.0,
        G=g,
        GP=max(16, triton.next_power_of_2(g)),
        D=d,
        DP=max(16, triton.next_power_of_2(d)),
        T=PAGE_TOKENS,
        FEW=FEW,
        num_warps=2,
    )


@_page_exact.register_fake
def _(
    q: torch.Tensor,
    unit: torch.Tensor,
    length: torch.Tensor,
    lse: torch.Tensor,
    words: torch.Tensor,
    signs: torch.Tensor,
    fine: torch.Tensor,
    means: torch.Tensor,
    shares: torch.Tensor,
    numbers: torch.Tensor,
    chosen: torch.Tensor,
    counts: torch.Tensor,
    exact: torch.Tensor,
    scale: float,
    softcap: float,
    best: int,
) -> None:
    return None


def page_exact(
    q: torch.Tensor,
    unit: torch.Tensor,
    length: torch.Tensor,
    lse: torch.Tensor,
    codes: PageCodes,
    chosen: torch.Tensor,
    counts: torch.Tensor,
    exact: torch.Tensor,
    scale: float,
    *,
    softcap: float | None = None,
    best: int = PAGE_TOKENS,
) -> None:
    """Score candidates; see the module docstring.

    Parameters
    ----------
    q : torch.Tensor
        ``(..., G, D)`` with U units in front, contiguous, of the pages' dtype.
    unit, length : torch.Tensor
        The same queries as `rotate_queries` writes them.
    lse : torch.Tensor
        float32 (U, G): by how much each head's logits weigh, see `page_select`.
    codes : PageCodes
        Of U * N slots; the addresses in its words are not checked.
    chosen, counts : torch.Tensor
        int32 (U, C) and (U,), as `page_select` writes them.
    exact : torch.Tensor
        float32 (U, C, G), contiguous; written.
    scale, softcap
        As for `paged_decode`.
    best : int, default=16
        Tokens of a page whose keys are read.

    Raises
    ------
    ValueError
        If a shape, dtype or number differs from the above.
    """
    units, n_candidates, g = exact.shape
    d = q.shape[-1]
    expected = (
        ("q", q.flatten(0, -3), (units, g, d), q.dtype),
        ("unit", unit.flatten(0, -3), (units, g, d), torch.float16),
        ("length", length.flatten(0, -2), (units, g), torch.float32),
        ("lse", lse, (units, g), torch.float32),
        ("chosen", chosen, (units, n_candidates), torch.int32),
        ("counts", counts, (units,), torch.int32),
        ("exact", exact, (units, n_candidates, g), torch.float32),
        ("signs", codes.signs, (codes.words.numel(), d), torch.int16),
    )
    for name, tensor, shape, dtype in expected:
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            msg = f"{name}: expected contiguous {shape} of {dtype}, got {tuple(tensor.shape)} of {tensor.dtype}"
            raise ValueError(msg)
    if codes.words.numel() % units or not 1 <= best <= PAGE_TOKENS:
        msg = f"words, best: expected {units} * N words and 1 to {PAGE_TOKENS}, got {codes.words.numel()} and {best}"
        raise ValueError(msg)
    _page_exact(q, unit, length, lse, *codes.tensors(), chosen, counts, exact, scale, softcap or 0.0, best)


def page_exact_ref(
    q: torch.Tensor, keys: torch.Tensor, live: torch.Tensor, scale: float, *, softcap: float | None = None
) -> torch.Tensor:
    """Log-sum-exp (U, N, G) in float64 of pages (U, N, 16, D) with live tokens (U, N, 16), for queries (U, G, D)."""
    return torch.logsumexp(_logits(q, keys, live, scale, softcap), -1)


def page_best_ref(
    q: torch.Tensor,
    keys: torch.Tensor,
    guessed: torch.Tensor,
    live: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    *,
    softcap: float | None = None,
    best: int,
) -> torch.Tensor:
    """Plain torch version of `page_exact` in float64, for all pages (U, N, 16, D).

    Parameters
    ----------
    guessed : torch.Tensor
        Keys as the summaries have them, turned back: (U, N, 16, D).
    lse : torch.Tensor
        (U, G).

    Returns
    -------
    torch.Tensor
        (U, N, G).
    """
    true, guess = (_logits(q, k, live, scale, softcap) for k in (keys, guessed))
    weight = (guess - lse.double()[:, None, :, None]).exp().sum(2)
    order = weight.argsort(dim=-1, descending=True, stable=True)[..., :best]
    among = torch.zeros_like(live).scatter_(-1, order, True)
    return torch.logsumexp(torch.where(among[:, :, None], true, guess), -1)


def _logits(
    q: torch.Tensor, keys: torch.Tensor, live: torch.Tensor, scale: float, softcap: float | None
) -> torch.Tensor:
    """(U, N, G, 16), minus infinity for dead tokens."""
    logits = torch.einsum("ugd,untd->ungt", q.double(), keys.double()) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.masked_fill(~live[:, :, None], float("-inf"))
