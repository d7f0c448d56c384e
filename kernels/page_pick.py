"""Choose the pages to read among candidates whose exact log-sum-exp is known.

Dimension key: U units, N slots of a unit, G query heads per KV head, C candidates, K places of the page table.

    known[u, g]  = sum_c exp(exact[u, c, g])
    guess[u, g]  = sum_c exp(estimate of the same pages)
    total[u, g]  = known + min(known / guess, 1) * (sum over all other pages of exp(estimate))
    weight[u, c] = sum_g exp(exact[u, c, g]) / total[u, g]

Estimates make room for what they do not know, so their sums are too large, and not for all heads alike: the candidates
show by how much. The `n_pages` candidates with the largest weights go to the table, in ascending order of slots; zeros
follow. A unit that is read whole gives all its pages, as many as there are places: the caller makes sure that they are
candidates.

Afterwards, if asked, `logits` says what a unit has left: minus infinity for pages in the table, and for other
candidates what they hold, on the scale of the estimates (log-sum-exp plus log (guess / known), at least 0).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from icecache.kernels.page_select import choose


@triton.jit
def weights_of(
    exact_ptr,  # [U, C, G] float32
    logits_ptr,  # [U, G, N] float32
    lse_ptr,  # [U, G] float32
    u,
    c,  # [CP]
    slot,  # [CP] int32
    there,  # [CP]
    n_slots,  # N
    n_candidates,  # C
    whole,
    G: tl.constexpr,
    GP: tl.constexpr,
):
    """Weights [CP] of candidates, `exact` and masses over exp(top) [CP, GP]; `top`, totals over it, and excess [GP]."""
    g = tl.arange(0, GP)
    pair = there[:, None] & (g < G)[None, :]
    exact = tl.load(exact_ptr + (u * n_candidates + c)[:, None] * G + g[None, :], mask=pair, other=float("-inf"))
    guess_ptr = logits_ptr + (u * G + g)[None, :] * n_slots + slot[:, None]
    guess = tl.load(guess_ptr, mask=pair, other=float("-inf"))
    lse = tl.load(lse_ptr + u * G + g, mask=g < G, other=float("-inf"))
    top = tl.maximum(lse, tl.max(exact, 0))
    top = tl.where(top == float("-inf"), 0.0, top)
    mass = tl.exp(exact - top[None, :])
    known = tl.sum(mass, 0)
    guessed = tl.sum(tl.exp(guess - top[None, :]), 0)
    # What the estimates of the candidates leave of the whole; rounding must not make it negative.
    rest = tl.maximum(tl.exp(lse - top) - guessed, 0.0)
    share = tl.where(guessed > known, known / tl.where(guessed > known, guessed, 1.0), 1.0)
    rest *= share
    total = known + tl.where(whole != 0, 0.0, rest)
    weight = tl.sum(mass / tl.where(total == 0.0, 1.0, total)[None, :], 1)
    excess = -tl.log(tl.where(share > 0.0, share, 1.0))
    return weight, exact, mass, top, total, excess


@triton.jit
def _page_pick_kernel(
    exact_ptr,  # [U, C, G] float32
    logits_ptr,  # [U, G, N] float32
    lse_ptr,  # [U, G] float32
    words_ptr,  # [U, N] int64
    chosen_ptr,  # [U, C] int32
    counts_ptr,  # [U] int32
    whole_ptr,  # [U] int32
    table_ptr,  # [U, K] int64
    host_table_ptr,  # [U, K] int64
    host_lse_ptr,  # [U, G, 2] float32
    n_slots,  # N
    n_candidates,  # C
    n_pages,
    n_places,  # K
    G: tl.constexpr,
    GP: tl.constexpr,
    CP: tl.constexpr,
    KP: tl.constexpr,
    LEAVES: tl.constexpr,
):
    """One program per unit."""
    u = tl.program_id(0).to(tl.int64)
    count = tl.load(counts_ptr + u)
    whole = tl.load(whole_ptr + u)
    c = tl.arange(0, CP)
    g = tl.arange(0, GP)
    there = c < count
    slot = tl.load(chosen_ptr + u * n_candidates + c, mask=there, other=0)
    word = tl.load(words_ptr + u * n_slots + slot, mask=there, other=0)
    weight, exact, mass, top, total, excess = weights_of(
        exact_ptr, logits_ptr, lse_ptr, u, c, slot, there, n_slots, n_candidates, whole, G, GP
    )
    bits = tl.maximum(weight.to(tl.int32, bitcast=True), 1)
    taken = choose(tl.where(there, bits, 0), tl.where(whole != 0, n_places, n_pages))
    place = tl.cumsum(taken.to(tl.int32), 0) - 1
    n_taken = tl.sum(taken.to(tl.int32), 0)
    k = tl.arange(0, KP)
    unused = (k >= n_taken) & (k < n_places)
    none = tl.zeros([KP], tl.int64)
    tl.store(table_ptr + u * n_places + place, word, mask=taken)
    tl.store(table_ptr + u * n_places + k, none, mask=unused)
    tl.store(host_table_ptr + u * n_places + place, word, mask=taken)
    tl.store(host_table_ptr + u * n_places + k, none, mask=unused)
    if LEAVES:
        left = tl.where(taken[:, None], float("-inf"), exact + excess[None, :])
        logit_ptr = logits_ptr + (u * G + g)[None, :] * n_slots + slot[:, None]
        tl.store(logit_ptr, left, mask=there[:, None] & (g < G)[None, :])
    kept = tl.sum(tl.where(taken[:, None], mass, 0.0), 0)
    out_ptr = host_lse_ptr + (u * G + g) * 2
    tl.store(out_ptr, top + tl.log(total), mask=g < G)
    tl.store(out_ptr + 1, top + tl.log(kept), mask=g < G)


@torch.library.custom_op("icecache::page_pick", mutates_args=("logits", "table", "host_table", "host_lse"))
def _page_pick(
    exact: torch.Tensor,
    logits: torch.Tensor,
    lse: torch.Tensor,
    words: torch.Tensor,
    chosen: torch.Tensor,
    counts: torch.Tensor,
    whole: torch.Tensor,
    table: torch.Tensor,
    host_table: torch.Tensor,
    host_lse: torch.Tensor,
    n_pages: int,
    leaves: bool,
) -> None:
    units, n_candidates, g = exact.shape
    places = table.numel() // units
    _page_pick_kernel[(units,)](
        exact,
        logits,
        lse,
        words,
        chosen,
        counts,
        whole,
        table,
        host_table,
        host_lse,
        logits.shape[2],
        n_candidates,
        n_pages,
        places,
        G=g,
        GP=triton.next_power_of_2(g),
        CP=triton.next_power_of_2(n_candidates),
        KP=triton.next_power_of_2(places),
        LEAVES=leaves,
        num_warps=1 if n_candidates <= 64 else 4,  # one warp counts without waiting for others
    )


@_page_pick.register_fake
def _(
    exact: torch.Tensor,
    logits: torch.Tensor,
    lse: torch.Tensor,
    words: torch.Tensor,
    chosen: torch.Tensor,
    counts: torch.Tensor,
    whole: torch.Tensor,
    table: torch.Tensor,
    host_table: torch.Tensor,
    host_lse: torch.Tensor,
    n_pages: int,
    leaves: bool,
) -> None:
    return None


def page_pick(
    exact: torch.Tensor,
    logits: torch.Tensor,
    lse: torch.Tensor,
    words: torch.Tensor,
    chosen: torch.Tensor,
    counts: torch.Tensor,
    whole: torch.Tensor,
    table: torch.Tensor,
    host_table: torch.Tensor,
    host_lse: torch.Tensor,
    *,
    n_pages: int,
    leaves: bool = False,
) -> None:
    """Fill the page table; see the module docstring.

    Parameters
    ----------
    exact, logits, lse, words, chosen, counts : torch.Tensor
        As the kernels before read and wrote them.
    whole : torch.Tensor
        int32 (U,): not 0 where all pages are read.
    table, host_table : torch.Tensor
        int64 (..., K) with U units in front, contiguous; both are written. The second may be registered host
        memory.
    host_lse : torch.Tensor
        float32 (..., G, 2): log-sum-exp over all pages and over the chosen ones; of a unit without pages minus
        infinity. A query that is not finite gives NaN.
    n_pages : int
        Pages to choose, at most K.
    leaves : bool, default=False
        Whether to write what is left into `logits`.

    Raises
    ------
    ValueError
        If a shape or dtype differs from the above.
    """
    units, n_candidates, g = exact.shape
    places = table.shape[-1]
    expected = (
        ("exact", exact, (units, n_candidates, g), torch.float32),
        ("logits", logits, (units, g, logits.shape[2]), torch.float32),
        ("lse", lse, (units, g), torch.float32),
        ("words", words, (units * logits.shape[2],), torch.int64),
        ("chosen", chosen, (units, n_candidates), torch.int32),
        ("counts", counts, (units,), torch.int32),
        ("whole", whole, (units,), torch.int32),
        ("table", table.flatten(0, -2), (units, places), torch.int64),
        ("host_table", host_table.flatten(0, -2), (units, places), torch.int64),
        ("host_lse", host_lse.flatten(0, -3), (units, g, 2), torch.float32),
    )
    for name, tensor, shape, dtype in expected:
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            msg = f"{name}: expected contiguous {shape} of {dtype}, got {tuple(tensor.shape)} of {tensor.dtype}"
            raise ValueError(msg)
    if not 1 <= n_pages <= places:
        msg = f"n_pages: expected 1 to {places} places, got {n_pages}"
        raise ValueError(msg)
    _page_pick(exact, logits, lse, words, chosen, counts, whole, table, host_table, host_lse, n_pages, leaves)


def page_pick_ref(
    exact: torch.Tensor, logits: torch.Tensor, chosen: list[list[int]], n_pages: int
) -> tuple[list[list[int]], torch.Tensor]:
    """Plain torch version of `page_pick` for units that are not read whole.

    Parameters
    ----------
    exact : torch.Tensor
        (U, N, G): exact log-sum-exp of all pages; only those of candidates are looked at.
    logits : torch.Tensor
        (U, G, N): estimates.

    Returns
    -------
    picked : list of list of int
        Slots, ascending.
    lse : torch.Tensor
        (U, G, 2).
    """
    picked, sums = [], []
    for unit, slots in enumerate(chosen):
        scores = logits[unit].clone()
        known = exact[unit, slots].T.to(scores.dtype)
        too_much = torch.logsumexp(scores[:, slots], -1) - torch.logsumexp(known, -1)
        scores -= too_much.clamp(min=0).nan_to_num(0.0)[:, None]
        scores[:, slots] = known
        total = torch.logsumexp(scores, -1)
        weight = (scores[:, slots] - total[:, None]).exp().sum(0)
        best = torch.argsort(weight, descending=True, stable=True)[:n_pages].tolist()
        taken = sorted(slots[i] for i in best)
        picked.append(taken)
        sums.append(torch.stack([total, torch.logsumexp(scores[:, taken], -1)], -1))
    return picked, torch.stack(sums)
