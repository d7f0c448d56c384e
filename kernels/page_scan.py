"""Estimate the log-sum-exp of every page from its summary, for all query heads of a KV head.

Dimension key: U units, that is (sequence, KV head), N slots of a unit, G query heads per KV head, D key dim, J blocks
of `SLOT_BLOCK` slots.

    logit[g, t]  = scale * length[g] * (unit[g] . key[t] + reach * distance)       key: the fit of `page_codes`
    logits[u, g, n] = log sum_t exp(logit[g, t])           over the live tokens t of the page, see `page_codes`

`reach` makes room for what a summary rounds away: a page must not be overlooked because its key was rounded against the
query. A soft cap applies to each logit. Pages that are not there get minus infinity. `parts[u, j, g]` are maximum and
sum of `exp(logits - maximum)` over the slots of block j; blocks behind the extent are not written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from icecache.kernels.page_codes import SIGN_STEP, PageCodes

SLOT_BLOCK = 64
"""Slots of a program."""
REACH = (0.2, 0.1)
"""`reach` with one bit and with two: a tenth is a third of the deviation of what two bits round away. Measured on
keys of a trained model (docs/LOG.md)."""


@triton.jit
def _signed_ones(plane, NATIVE: tl.constexpr):
    """1.0 with the highest bit of each int16 as its sign. Natively two elements at a time: (x & 0x8000) | 0x3C00."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, 0x80008000, 0x3C003C00, 0xEA;", "=r,r", [plane], dtype=tl.float16, is_pure=True, pack=2
        )
    return ((plane & -32768) | 0x3C00).to(tl.float16, bitcast=True)


@triton.jit
def _signed_twos(plane, NATIVE: tl.constexpr):
    """2.0 with the highest bit of each int16 as its sign."""
    if NATIVE:
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, 0x80008000, 0x40004000, 0xEA;", "=r,r", [plane], dtype=tl.float16, is_pure=True, pack=2
        )
    return ((plane & -32768) | 0x4000).to(tl.float16, bitcast=True)


@triton.jit
def _next_bit(plane, NATIVE: tl.constexpr):
    """Each int16 shifted left. Natively two at a time: what passes to the next one needs 16 steps to its top."""
    if NATIVE:
        return tl.inline_asm_elementwise("shl.b32 $0, $1, 1;", "=r,r", [plane], dtype=tl.int16, is_pure=True, pack=2)
    return plane << 1


@triton.jit
def _page_scan_kernel(
    unit_ptr,  # [U, G, D] float16
    length_ptr,  # [U, G] float32
    extents_ptr,  # [U] int32, slots in use
    words_ptr,  # [U, N] int64
    signs_ptr,  # [U, N, D] int16
    fine_ptr,  # [U, N, D] int16
    means_ptr,  # [U, N, D / 2] uint8
    shares_ptr,  # [U, N, 16] uint8
    numbers_ptr,  # [3, ...] float32
    logits_ptr,  # [U, G, N] float32
    parts_ptr,  # [U, J, G, 2] float32
    stride_numbers,
    n_slots,  # N
    n_blocks,  # J
    scale,
    reach,
    softcap,
    SHARE: tl.constexpr,  # of a step, per 255th
    HAS_CAP: tl.constexpr,
    FINE: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    T: tl.constexpr,
    NB: tl.constexpr,
    NATIVE: tl.constexpr,  # not in the interpreter, which knows no inline assembly
):
    """One program per (block of slots, unit)."""
    block = tl.program_id(0)
    u = tl.program_id(1).to(tl.int64)
    extent = tl.load(extents_ptr + u)
    if block * NB >= extent:
        return
    n = block * NB + tl.arange(0, NB)
    inside = n < extent
    slot = u * n_slots + n  # int64: slots of one unit times D pass 2**31
    g = tl.arange(0, GP)
    d = tl.arange(0, DP)
    j = tl.arange(0, DP // 2)
    q_ptr = unit_ptr + (u * G + g)[None, :] * D
    q = tl.load(q_ptr + d[:, None], mask=(d < D)[:, None] & (g < G)[None, :], other=0.0)  # [DP, GP]
    half = (j < D // 2)[:, None] & (g < G)[None, :]
    q_even = tl.load(q_ptr + 2 * j[:, None], mask=half, other=0.0)
    q_odd = tl.load(q_ptr + 2 * j[:, None] + 1, mask=half, other=0.0)
    word = tl.load(words_ptr + slot, mask=inside, other=0)
    bytes_ = tl.load(
        means_ptr + slot[:, None] * (D // 2) + j[None, :], mask=inside[:, None] & (j < D // 2)[None, :], other=0
    ).to(tl.int32)
    along_mean = tl.dot(((bytes_ & 15) - 8).to(tl.float16), q_even)  # [NB, GP]
    along_mean += tl.dot(((bytes_ >> 4) - 8).to(tl.float16), q_odd)
    mean_scale = tl.load(numbers_ptr + slot, mask=inside, other=0.0)
    step = tl.load(numbers_ptr + stride_numbers + slot, mask=inside, other=0.0)
    distance = tl.load(numbers_ptr + 2 * stride_numbers + slot, mask=inside, other=0.0)
    base = along_mean * mean_scale[:, None] + (reach * distance)[:, None]
    factor = scale * tl.load(length_ptr + u * G + g, mask=g < G, other=0.0)
    element = slot[:, None] * D + d[None, :]
    filled = inside[:, None] & (d < D)[None, :]
    signs = tl.load(signs_ptr + element, mask=filled, other=0)  # [NB, DP]
    if FINE:
        fine = tl.load(fine_ptr + element, mask=filled, other=0)
    m = tl.full([NB, GP], float("-inf"), tl.float32)
    total = tl.zeros([NB, GP], tl.float32)
    # Unrolled, so that the planes are brought into the layout of the products once and not for each token.
    for i in tl.static_range(T):
        t = T - 1 - i
        if FINE:
            along = tl.dot(_signed_ones(fine, NATIVE), q)
            along = tl.dot(_signed_twos(signs, NATIVE), q, along)
            fine = _next_bit(fine, NATIVE)
        else:
            along = tl.dot(_signed_ones(signs, NATIVE), q)
        signs = _next_bit(signs, NATIVE)
        share = SHARE * tl.load(shares_ptr + slot * T + t, mask=inside, other=0).to(tl.float32)
        logit = (base + (step * share)[:, None] * along) * factor[None, :]
        if HAS_CAP:
            logit = softcap * (2.0 * tl.sigmoid(2.0 * logit / softcap) - 1.0)
        live = ((word >> (t + 48)) & 1) != 0
        logit = tl.where(live[:, None], logit, float("-inf"))
        m_new = tl.maximum(m, logit)
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        total = total * tl.exp(m - m_safe) + tl.exp(logit - m_safe)
        m = m_new
    page = tl.where(total > 0.0, m + tl.log(tl.where(total > 0.0, total, 1.0)), float("-inf"))
    page = tl.where(total != total, total, page)  # a query that is not a number must not look like an absent page
    tl.store(logits_ptr + (u * G + g)[None, :] * n_slots + n[:, None], page, mask=inside[:, None] & (g < G)[None, :])
    top = tl.max(page, 0)
    top_safe = tl.where(top == float("-inf"), 0.0, top)
    sums = tl.sum(tl.exp(page - top_safe[None, :]), 0)
    part_ptr = parts_ptr + ((u * n_blocks + block) * G + g) * 2
    tl.store(part_ptr, top, mask=g < G)
    tl.store(part_ptr + 1, sums, mask=g < G)


@torch.library.custom_op("icecache::page_scan", mutates_args=("logits", "parts"))
def _page_scan(
    unit: torch.Tensor,
    length: torch.Tensor,
    extents: torch.Tensor,
    words: torch.Tensor,
    signs: torch.Tensor,
    fine: torch.Tensor,
    means: torch.Tensor,
    shares: torch.Tensor,
    numbers: torch.Tensor,
    logits: torch.Tensor,
    parts: torch.Tensor,
    scale: float,
    softcap: float,
    use_fine: bool,
) -> None:
    units, g, n = logits.shape
    d = signs.shape[1]
    _page_scan_kernel[(triton.cdiv(n, SLOT_BLOCK), units)](
        unit,
        length,
        extents,
        words,
        signs,
        fine,
        means,
        shares,
        numbers,
        logits,
        parts,
        numbers.stride(0),
        n,
        parts.shape[1],
        scale,
        REACH[use_fine],
        softcap,
        SHARE=(1.0 if use_fine else SIGN_STEP) / 255.0,
        HAS_CAP=softcap > 0.0,
        FINE=use_fine,
        G=g,
        GP=max(8, triton.next_power_of_2(g)),
        D=d,
        DP=max(32, triton.next_power_of_2(d)),
        T=16,
        NB=SLOT_BLOCK,
        NATIVE=not triton.knobs.runtime.interpret,
        num_warps=4,
    )


@_page_scan.register_fake
def _(
    unit: torch.Tensor,
    length: torch.Tensor,
    extents: torch.Tensor,
    words: torch.Tensor,
    signs: torch.Tensor,
    fine: torch.Tensor,
    means: torch.Tensor,
    shares: torch.Tensor,
    numbers: torch.Tensor,
    logits: torch.Tensor,
    parts: torch.Tensor,
    scale: float,
    softcap: float,
    use_fine: bool,
) -> None:
    return None


def n_parts(n_slots: int) -> int:
    """Blocks of `n_slots` slots."""
    return triton.cdiv(n_slots, SLOT_BLOCK)


def page_scan(
    unit: torch.Tensor,
    length: torch.Tensor,
    extents: torch.Tensor,
    codes: PageCodes,
    logits: torch.Tensor,
    parts: torch.Tensor,
    scale: float,
    *,
    softcap: float | None = None,
    fine: bool = True,
) -> None:
    """Estimate all pages of all units; see the module docstring.

    Parameters
    ----------
    unit, length : torch.Tensor
        As `rotate_queries` writes them; the first two axes together are U.
    extents : torch.Tensor
        int32 (U,): slots from there on hold no page.
    codes : PageCodes
        Of U * N slots; views that start at the first unit.
    logits : torch.Tensor
        float32 (U, G, N), contiguous; written up to the extents.
    parts : torch.Tensor
        float32 (U, `n_parts` (N), G, 2), contiguous; written up to the extents.
    scale : float
        Factor on the logits.
    softcap : float, optional
        ``softcap * tanh(logit / softcap)``.
    fine : bool, default=True
        Use both bits of an element; False: the sign alone.

    Raises
    ------
    ValueError
        If a shape or dtype differs from the above.
    """
    units, g, n = logits.shape
    d = codes.signs.shape[1]
    expected = (
        ("unit", unit.flatten(0, -3), (units, g, d), torch.float16),
        ("length", length.flatten(0, -2), (units, g), torch.float32),
        ("extents", extents, (units,), torch.int32),
        ("words", codes.words, (units * n,), torch.int64),
        ("logits", logits, (units, g, n), torch.float32),
        ("parts", parts, (units, n_parts(n), g, 2), torch.float32),
    )
    for name, tensor, shape, dtype in expected:
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            msg = f"{name}: expected contiguous {shape} of {dtype}, got {tuple(tensor.shape)} of {tensor.dtype}"
            raise ValueError(msg)
    _page_scan(unit, length, extents, *codes.tensors(), logits, parts, scale, softcap or 0.0, fine)


def page_scan_ref(
    q: torch.Tensor,
    rotation: torch.Tensor,
    keys: torch.Tensor,
    distance: torch.Tensor,
    words: torch.Tensor,
    scale: float,
    *,
    softcap: float | None = None,
    reach: float,
) -> torch.Tensor:
    """Plain torch version of `page_scan` in float64, from queries (U, G, D) and decoded keys (U, N, 16, D).

    Parameters
    ----------
    distance, words : torch.Tensor
        (U, N).

    Returns
    -------
    torch.Tensor
        float64 (U, G, N).
    """
    q = q.double()
    logits = torch.einsum("ugd,untd->ugnt", q @ rotation.double(), keys.double())
    logits = (logits + reach * q.norm(dim=-1)[:, :, None, None] * distance.double()[:, None, :, None]) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    live = ((words[..., None] >> (48 + torch.arange(16, device=words.device))) & 1).bool()
    return torch.logsumexp(logits.masked_fill(~live[:, None], float("-inf")), -1)
