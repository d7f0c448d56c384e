"""Choose the pages with the most attention mass, summed over the query heads of a KV head.

Dimension key: U units, N slots of a unit, G query heads per KV head, J parts of `page_scan`, L blocks, C candidates.

    share[u, g, n] = exp(logits[u, g, n] - log sum_n exp(logits[u, g, n]))
    weight[u, n]   = sum_g share[u, g, n]

The C slots with the largest weights, in ascending order of slots; of equal weights the lower slots. Absent pages are
never chosen, pages without weight only if there are not enough others.

Each block of `BLOCK` slots names its best C, then one program a unit chooses among those. The C-th largest weight is
found by halving the range of its bit pattern, which for numbers that are not negative has their order: 31 counts over
weights that stay in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

BLOCK = 1024
MAX_SLOTS = 1 << 17
"""Slots of a unit, so that one program can hold the best of all blocks: two million tokens."""


@triton.jit
def choose(bits, n_wanted):
    """Mark the `n_wanted` largest of int32 [N] numbers, none of them negative; 0 is never marked, first of equals."""
    low = 1
    high = 0x7FFFFFFF
    for _ in range(31):
        middle = low + (high - low + 1) // 2
        enough = tl.sum((bits >= middle).to(tl.int32), 0) >= n_wanted
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    above = bits > low
    equal = bits == low
    rest = n_wanted - tl.sum(above.to(tl.int32), 0)
    return above | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= rest))


@triton.jit
def _best_of_block_kernel(
    logits_ptr,  # [U, G, N] float32
    parts_ptr,  # [U, J, G, 2] float32
    words_ptr,  # [U, N] int64
    extents_ptr,  # [U] int32
    slots_ptr,  # [U, L, C] int32
    bits_ptr,  # [U, L, C] int32
    counts_ptr,  # [U, L] int32
    lse_ptr,  # [U, G] float32
    n_slots,  # N
    n_parts,  # J
    n_candidates,  # C
    SLOT_BLOCK: tl.constexpr,
    G: tl.constexpr,
    GP: tl.constexpr,
    JP: tl.constexpr,  # J padded to a power of two
    LB: tl.constexpr,
):
    """One program per (block of LB slots, unit): the best C slots of the block."""
    block = tl.program_id(0)
    u = tl.program_id(1).to(tl.int64)
    extent = tl.load(extents_ptr + u)
    row = u * tl.num_programs(0) + block
    j = tl.arange(0, JP)
    g = tl.arange(0, GP)
    there = (j * SLOT_BLOCK < extent)[:, None] & (g < G)[None, :]
    part_ptr = parts_ptr + ((u * n_parts + j[:, None]) * G + g[None, :]) * 2
    tops = tl.load(part_ptr, mask=there, other=float("-inf"))
    sums = tl.load(part_ptr + 1, mask=there, other=0.0)
    top = tl.max(tops, 0)
    top_safe = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp(tops - top_safe[None, :]) * sums, 0)
    lse = tl.where(total == 0.0, float("-inf"), top + tl.log(tl.where(total == 0.0, 1.0, total)))
    tl.store(lse_ptr + u * G + g, lse, mask=g < tl.where(block == 0, G, 0))
    n = block * LB + tl.arange(0, LB)
    weight = tl.zeros([LB], tl.float32)
    for head in tl.static_range(G):
        lse_head = tl.sum(tl.where(g == head, tl.where(total == 0.0, 0.0, lse), 0.0), 0)
        logit = tl.load(logits_ptr + (u * G + head) * n_slots + n, mask=n < extent, other=float("-inf"))
        weight += tl.exp(logit - lse_head)
    word = tl.load(words_ptr + u * n_slots + n, mask=n < extent, other=0)
    bits = tl.where(word != 0, tl.maximum(weight.to(tl.int32, bitcast=True), 1), 0)
    taken = choose(bits, n_candidates)
    place = row * n_candidates + tl.cumsum(taken.to(tl.int32), 0) - 1
    tl.store(slots_ptr + place, n, mask=taken)
    tl.store(bits_ptr + place, bits, mask=taken)
    tl.store(counts_ptr + row, tl.sum(taken.to(tl.int32), 0))


@triton.jit
def _best_of_unit_kernel(
    slots_ptr,  # [U, L, C] int32
    bits_ptr,  # [U, L, C] int32
    block_counts_ptr,  # [U, L] int32
    chosen_ptr,  # [U, C] int32
    counts_ptr,  # [U] int32
    n_blocks,  # L
    n_candidates,  # C
    MP: tl.constexpr,  # L * C padded to a power of two
):
    """One program per unit: the best C of the blocks' best."""
    u = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, MP)
    block = i // n_candidates
    in_block = tl.load(block_counts_ptr + u * n_blocks + block, mask=block < n_blocks, other=0)
    there = i % n_candidates < in_block
    entry = u * n_blocks * n_candidates + i
    bits = tl.load(bits_ptr + entry, mask=there, other=0)
    taken = choose(bits, n_candidates)
    place = tl.cumsum(taken.to(tl.int32), 0) - 1
    tl.store(chosen_ptr + u * n_candidates + place, tl.load(slots_ptr + entry, mask=there, other=0), mask=taken)
    tl.store(counts_ptr + u, tl.sum(taken.to(tl.int32), 0))


@torch.library.custom_op("icecache::page_select", mutates_args=("scratch", "chosen", "counts", "lse"))
def _page_select(
    logits: torch.Tensor,
    parts: torch.Tensor,
    words: torch.Tensor,
    extents: torch.Tensor,
    scratch: torch.Tensor,
    chosen: torch.Tensor,
    counts: torch.Tensor,
    lse: torch.Tensor,
    slot_block: int,
) -> None:
    units, g, n = logits.shape
    n_candidates, n_blocks = chosen.shape[1], triton.cdiv(n, BLOCK)
    size = units * n_blocks * n_candidates
    slots, bits, block_counts = scratch[:size], scratch[size : 2 * size], scratch[2 * size :]
    _best_of_block_kernel[(n_blocks, units)](
        logits,
        parts,
        words,
        extents,
        slots,
        bits,
        block_counts,
        lse,
        n,
        parts.shape[1],
        n_candidates,
        SLOT_BLOCK=slot_block,
        G=g,
        GP=triton.next_power_of_2(g),
        JP=triton.next_power_of_2(parts.shape[1]),
        LB=BLOCK,
        num_warps=4,
    )
    padded = triton.next_power_of_2(n_blocks * n_candidates)
    best_of_all = slots, bits, block_counts, chosen, counts, n_blocks, n_candidates
    # A warp alone counts without waiting for others; it holds 16 numbers a thread.
    _best_of_unit_kernel[(units,)](*best_of_all, MP=padded, num_warps=min(max(padded // 512, 1), 16))


@_page_select.register_fake
def _(
    logits: torch.Tensor,
    parts: torch.Tensor,
    words: torch.Tensor,
    extents: torch.Tensor,
    scratch: torch.Tensor,
    chosen: torch.Tensor,
    counts: torch.Tensor,
    lse: torch.Tensor,
    slot_block: int,
) -> None:
    return None


def select_scratch(units: int, n_slots: int, n_candidates: int) -> int:
    """Elements of scratch memory that `page_select` wants."""
    return units * triton.cdiv(n_slots, BLOCK) * (2 * n_candidates + 1)


def page_select(
    logits: torch.Tensor,
    parts: torch.Tensor,
    words: torch.Tensor,
    extents: torch.Tensor,
    scratch: torch.Tensor,
    chosen: torch.Tensor,
    counts: torch.Tensor,
    lse: torch.Tensor,
    *,
    slot_block: int,
) -> None:
    """Choose candidates; see the module docstring.

    Parameters
    ----------
    logits, parts, extents : torch.Tensor
        As `page_scan` reads and writes them.
    words : torch.Tensor
        int64 (U * N,).
    scratch : torch.Tensor
        int32, `select_scratch` elements; its content means nothing.
    chosen, counts : torch.Tensor
        int32 (U, C) and (U,): slots, and how many there are; the rest of `chosen` is not written.
    lse : torch.Tensor
        float32 (U, G): log-sum-exp of all logits, minus infinity for none.
    slot_block : int
        Slots of a block of `parts`.

    Raises
    ------
    ValueError
        If a shape or dtype differs from the above, or N passes `MAX_SLOTS`.
    """
    units, g, n = logits.shape
    if n > MAX_SLOTS:
        msg = f"logits: expected at most {MAX_SLOTS} slots, got {n}"
        raise ValueError(msg)
    expected = (
        ("logits", logits, (units, g, n), torch.float32),
        ("parts", parts, (units, triton.cdiv(n, slot_block), g, 2), torch.float32),
        ("words", words, (units * n,), torch.int64),
        ("extents", extents, (units,), torch.int32),
        ("scratch", scratch, (select_scratch(units, n, chosen.shape[-1]),), torch.int32),
        ("chosen", chosen, (units, chosen.shape[-1]), torch.int32),
        ("counts", counts, (units,), torch.int32),
        ("lse", lse, (units, g), torch.float32),
    )
    for name, tensor, shape, dtype in expected:
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            msg = f"{name}: expected contiguous {shape} of {dtype}, got {tuple(tensor.shape)} of {tensor.dtype}"
            raise ValueError(msg)
    _page_select(logits, parts, words, extents, scratch, chosen, counts, lse, slot_block)


def page_select_ref(logits: torch.Tensor, words: torch.Tensor, n_candidates: int) -> list[list[int]]:
    """Plain torch version of `page_select` in the dtype of `logits` (U, G, N): the chosen slots of each unit."""
    weight = torch.softmax(logits.nan_to_num(neginf=-1e300), -1).sum(1)
    chosen = []
    for row, word in zip(weight, words.view(len(logits), -1), strict=True):
        slots = [n for n in torch.argsort(row, descending=True, stable=True).tolist() if word[n] != 0]
        chosen.append(sorted(slots[:n_candidates]))
    return chosen
