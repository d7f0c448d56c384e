"""Summaries of pages that are searched on the device: a coarse mean, and one or two bits per element of every key.

Dimension key: S slots, P planes (bits per element), D key dim, T = 16 tokens of a page.

Keys are rotated by an orthonormal matrix first, which spreads channels that stick out over all of them:

    r[t] = k[t] @ rotation,   mean = scale * m (4 bits an element),   x[t] = r[t] - mean
    code[t, d] in 0 .. 2**P - 1,   v = 2 code - (2**P - 1)            odd numbers, signed
    r[t] ~ mean + step * share[t] * v[t]                              the least squares fit of x[t] by v[t]

What a slot holds: `words` its page (see `paged_decode`; 0: none), `planes` bit t of element d: **clear** if digit p of
code[t, d] is set, so that it can serve as a sign; `means` elements 2 j and 2 j + 1 of m + 8 in the low and high half of
byte j; `shares` of the tokens, 0 to 1; `numbers` scale, step, and the largest distance of a live key to its fit.

Slots are read where pages lie: the memory may be registered host memory.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

PAGE_TOKENS = 16
STEP_OF_DEVIATION = 0.9957
"""Best distance of four equally spaced levels, in standard deviations of a normal variable."""
K_BLOCK = 32
"""Rows of the rotation loaded at a time: all of them do not fit the shared memory at 256 dimensions."""


class PageCodes:
    """Summaries of slots, on the device.

    Parameters
    ----------
    words : torch.Tensor
        int64 (S,).
    planes : torch.Tensor
        int16 (S, P, D).
    means : torch.Tensor
        uint8 (S, D / 2).
    shares : torch.Tensor
        float16 (S, 16).
    numbers : torch.Tensor
        float32 (3, S).
    """

    __slots__ = ("means", "numbers", "planes", "shares", "words")

    def __init__(
        self,
        words: torch.Tensor,
        planes: torch.Tensor,
        means: torch.Tensor,
        shares: torch.Tensor,
        numbers: torch.Tensor,
    ) -> None:
        self.words, self.planes, self.means, self.shares, self.numbers = words, planes, means, shares, numbers

    def part(self, first: int, stop: int) -> PageCodes:
        """View some slots."""
        at = slice(first, stop)
        return PageCodes(self.words[at], self.planes[at], self.means[at], self.shares[at], self.numbers[:, at])

    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(t.nbytes for t in (self.words, self.planes, self.means, self.shares, self.numbers))


def slot_bytes(planes: int, dim: int) -> int:
    """Bytes of one slot."""
    return 8 + 2 * planes * dim + dim // 2 + 2 * PAGE_TOKENS + 12


def empty_codes(n_slots: int, planes: int, dim: int, device: torch.device) -> PageCodes:
    """Slots without a page.

    Raises
    ------
    ValueError
        If `planes` is not 1 or 2, or `dim` is odd.
    """
    if planes not in (1, 2) or dim % 2:
        msg = f"planes, dim: expected 1 or 2 and an even number, got {planes} and {dim}"
        raise ValueError(msg)
    return PageCodes(
        words=torch.zeros(n_slots, dtype=torch.int64, device=device),
        planes=torch.zeros(n_slots, planes, dim, dtype=torch.int16, device=device),
        means=torch.zeros(n_slots, dim // 2, dtype=torch.uint8, device=device),
        shares=torch.zeros(n_slots, PAGE_TOKENS, dtype=torch.float16, device=device),
        numbers=torch.zeros(3, n_slots, dtype=torch.float32, device=device),
    )


def rotation_matrix(dim: int, device: torch.device) -> torch.Tensor:
    """Orthonormal float32 (D, D), always the same for a `dim`."""
    noise = torch.randn(dim, dim, generator=torch.Generator().manual_seed(dim), dtype=torch.float64)
    return torch.linalg.qr(noise).Q.float().contiguous().to(device)


@triton.jit
def _page_codes_kernel(
    slots_ptr,  # [n] int64
    new_ptr,  # [n] int64 words
    rotation_ptr,  # [D, D] float32
    words_ptr,  # [S]
    planes_ptr,  # [S, P, D]
    means_ptr,  # [S, D / 2]
    shares_ptr,  # [S, 16]
    numbers_ptr,  # [3, S]
    n_slots,  # S
    like_ptr,  # anything of the pages' dtype
    STEP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
    P: tl.constexpr,
    T: tl.constexpr,
    KB: tl.constexpr,
):
    """One program per changed slot."""
    element = like_ptr.dtype.element_ty
    slot = tl.load(slots_ptr + tl.program_id(0))
    word = tl.load(new_ptr + tl.program_id(0))
    tl.store(words_ptr + slot, word)
    if word != 0:
        t = tl.arange(0, T)
        d = tl.arange(0, DP)
        live = ((word >> (t + 48).to(tl.int64)) & 1) != 0
        page = (word & 0xFFFFFFFFFFFF).to(tl.pointer_type(element))
        page = tl.multiple_of(page, 16)
        rotated = tl.zeros([T, DP], tl.float32)
        for first in range(0, D, KB):
            i = first + tl.arange(0, KB)
            keys = tl.load(page + t[:, None] * D + i[None, :], mask=live[:, None] & (i < D)[None, :], other=0.0)
            turn = tl.load(
                rotation_ptr + i[:, None] * D + d[None, :], mask=(i < D)[:, None] & (d < D)[None, :], other=0.0
            )
            rotated += tl.dot(keys.to(tl.float32), turn, input_precision="ieee")
        n_live = tl.sum(live.to(tl.float32), 0)
        mean = tl.sum(rotated, 0) / n_live  # rows that are not live are zero
        scale = tl.max(tl.abs(mean), 0) / 7.0
        inverse = tl.where(scale > 0.0, 1.0 / scale, 0.0)
        level = tl.minimum(tl.maximum(tl.floor(mean * inverse + 0.5), -7.0), 7.0)
        x = tl.where(live[:, None], rotated - (level * scale)[None, :], 0.0)
        square = tl.sum(x * x, 1)
        if P == 1:
            code = (x >= 0.0).to(tl.int32)
        else:
            width = STEP * tl.sqrt(square / D)
            inverse_width = tl.where(width > 0.0, 1.0 / width, 0.0)
            code = tl.minimum(tl.maximum(tl.floor(x * inverse_width[:, None]).to(tl.int32) + 2, 0), 3)
        v = tl.where((d < D)[None, :], (2 * code - ((1 << P) - 1)).to(tl.float32), 0.0)
        along = tl.sum(v * x, 1)
        fit = along / tl.sum(v * v, 1)
        step = tl.max(fit, 0)  # of a token that is not live it is 0
        share = tl.where(step > 0.0, fit / step, 0.0)
        distance = tl.sqrt(tl.max(tl.maximum(square - fit * along, 0.0), 0))
        for p in tl.static_range(P):
            clear = ((code >> p) & 1) ^ 1
            plane = tl.sum(clear << t[:, None], 0)
            tl.store(planes_ptr + (slot * P + p) * D + d, plane.to(tl.int16), mask=d < D)
        low, high = tl.split(tl.reshape((level + 8.0).to(tl.int32), [DP // 2, 2]))
        j = tl.arange(0, DP // 2)
        tl.store(means_ptr + slot * (D // 2) + j, (low | (high << 4)).to(tl.uint8), mask=j < D // 2)
        tl.store(shares_ptr + slot * T + t, share.to(tl.float16))
        tl.store(numbers_ptr + slot, scale)
        tl.store(numbers_ptr + n_slots + slot, step)
        tl.store(numbers_ptr + 2 * n_slots + slot, distance)


@torch.library.custom_op("icecache::page_codes", mutates_args=("words", "planes", "means", "shares", "numbers"))
def _page_codes(
    slots: torch.Tensor,
    new: torch.Tensor,
    rotation: torch.Tensor,
    like: torch.Tensor,
    words: torch.Tensor,
    planes: torch.Tensor,
    means: torch.Tensor,
    shares: torch.Tensor,
    numbers: torch.Tensor,
) -> None:
    dim = planes.shape[2]
    _page_codes_kernel[(slots.numel(),)](
        slots,
        new,
        rotation,
        words,
        planes,
        means,
        shares,
        numbers,
        words.numel(),
        like,
        STEP=STEP_OF_DEVIATION,
        D=dim,
        DP=max(16, triton.next_power_of_2(dim)),
        P=planes.shape[1],
        T=PAGE_TOKENS,
        KB=K_BLOCK,
        num_warps=4,
    )


@_page_codes.register_fake
def _(
    slots: torch.Tensor,
    new: torch.Tensor,
    rotation: torch.Tensor,
    like: torch.Tensor,
    words: torch.Tensor,
    planes: torch.Tensor,
    means: torch.Tensor,
    shares: torch.Tensor,
    numbers: torch.Tensor,
) -> None:
    return None


def page_codes(
    codes: PageCodes, slots: torch.Tensor, words: torch.Tensor, rotation: torch.Tensor, like: torch.Tensor
) -> None:
    """Put pages into slots and summarise them; see the module docstring.

    Parameters
    ----------
    codes : PageCodes
        Written in place.
    slots, words : torch.Tensor
        int64 (n,), contiguous: slots that change, each once, and their new words. The pages must stay as they are until
        the kernel has run; their keys come first.
    rotation : torch.Tensor
        float32 (D, D), see `rotation_matrix`.
    like : torch.Tensor
        Not empty, of the pages' dtype.

    Raises
    ------
    ValueError
        If a shape or dtype differs from the above.

    Notes
    -----
    Asynchronous on the current stream. Neither slots nor addresses are checked.
    """
    for name, tensor in (("slots", slots), ("words", words)):
        if tensor.shape != slots.shape or tensor.dtype != torch.int64 or tensor.dim() != 1:
            msg = f"{name}: expected one axis of int64 as long as slots, got {tuple(tensor.shape)} of {tensor.dtype}"
            raise ValueError(msg)
    dim = codes.planes.shape[2]
    if tuple(rotation.shape) != (dim, dim) or rotation.dtype != torch.float32 or not rotation.is_contiguous():
        msg = f"rotation: expected contiguous ({dim}, {dim}) float32, got {tuple(rotation.shape)} {rotation.dtype}"
        raise ValueError(msg)
    if slots.numel():
        parts = codes.words, codes.planes, codes.means, codes.shares, codes.numbers
        _page_codes(slots.contiguous(), words.contiguous(), rotation, like, *parts)


def page_codes_ref(
    codes: PageCodes, slots: torch.Tensor, words: torch.Tensor, rotation: torch.Tensor, keys: torch.Tensor
) -> None:
    """Plain torch version of `page_codes`; `keys` (n, 16, D) are those of the pages that `words` name."""
    codes.words[slots] = words
    there = words != 0
    slots, words, keys = slots[there], words[there], keys[there].double()
    n_planes, dim = codes.planes.shape[1:]
    token = torch.arange(PAGE_TOKENS, device=words.device)
    live = ((words[:, None] >> (48 + token)) & 1).bool()[..., None]
    rotated = torch.where(live, keys, 0.0) @ rotation.double()
    mean = rotated.sum(1) / live.sum(1)
    scale = mean.abs().amax(1, keepdim=True) / 7
    level = torch.floor(torch.nan_to_num(mean / scale) + 0.5).clamp(-7, 7)
    x = torch.where(live, rotated - (level * scale)[:, None], 0.0)
    width = STEP_OF_DEVIATION * (x.square().sum(2, keepdim=True) / dim).sqrt()
    code = (x >= 0).long() if n_planes == 1 else (torch.floor(torch.nan_to_num(x / width)).long() + 2).clamp(0, 3)
    v = (2 * code - (2**n_planes - 1)).double()
    fit = (v * x).sum(2) / v.square().sum(2)
    step = fit.amax(1, keepdim=True)
    digits = torch.arange(n_planes, device=words.device)[:, None]
    clear = 1 - ((code[:, :, None] >> digits) & 1)  # [n, 16, P, D]
    plane = (clear << token[:, None, None]).sum(1)
    codes.planes[slots] = torch.where(plane >= 2**15, plane - 2**16, plane).to(torch.int16)
    byte = level.long() + 8
    codes.means[slots] = (byte[:, ::2] | (byte[:, 1::2] << 4)).to(torch.uint8)
    codes.shares[slots] = torch.nan_to_num(fit / step).to(torch.float16)
    distance = (x - fit[..., None] * v).square().sum(2)
    distance = torch.where(live[..., 0], distance, 0.0).amax(1).sqrt()
    codes.numbers[:, slots] = torch.stack([scale[:, 0], step[:, 0], distance]).float()


def decoded(codes: PageCodes, slots: torch.Tensor) -> torch.Tensor:
    """Rotated keys (n, 16, D) float32 as the summaries of `slots` have them."""
    token = torch.arange(PAGE_TOKENS, device=slots.device)
    planes = codes.planes[slots].long()
    sign = 1 - 2 * ((planes[:, None] >> token[:, None, None]) & 1)  # [n, 16, P, D]
    v = (sign << torch.arange(planes.shape[1], device=slots.device)[:, None]).sum(2).float()
    byte = codes.means[slots].long()
    level = torch.stack([byte & 15, byte >> 4], -1).flatten(1) - 8
    scale, step, _ = codes.numbers[:, slots]
    fit = step[:, None] * codes.shares[slots].float()
    return (level * scale[:, None])[:, None] + fit[..., None] * v
