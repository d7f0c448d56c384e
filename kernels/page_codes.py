"""Summaries of pages that are searched on the device: a coarse mean, and two bits per element of every key.

Dimension key: S slots, D key dim, T = 16 tokens of a page.

Keys are rotated by an orthonormal matrix first, which spreads channels that stick out over all of them:

    r[t] = k[t] @ rotation,   mean = scale * m (4 bits an element),   x[t] = r[t] - mean
    v[t, d] = 2 s + f,   s = sign of x[t, d],   f = +1 or -1          -3, -1, 1 or 3: where x[t, d] lies
    r[t] ~ mean + step * share[t] * v[t]                              the least squares fit of x[t] by v[t]
    r[t] ~ mean + SIGN_STEP * step * share[t] * s[t]                  with the signs alone

What a slot holds: `words` its page (see `paged_decode`; 0: none), `signs` bit t of element d: set if s[t, d] is
negative, `fine` the same of f; `means` elements 2 j and 2 j + 1 of m + 8 in the low and high half of byte j; `shares`
of the tokens, in 255ths; `numbers` scale, step, and the largest distance of a live key to its fit by v.

`fine` may lie in page-locked host memory, which holds half of the summaries off the device: it is read for few pages.
Slots are read where pages lie: that memory may be page-locked host memory, too.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

PAGE_TOKENS = 16
STEP_OF_DEVIATION = 0.9957
"""Best distance of four equally spaced levels, in standard deviations of a normal variable."""
SIGN_STEP = 1.6
"""What the sign alone says of a normal variable, E |x| = .798 deviations, in steps of the fit by v, .498 deviations."""
K_BLOCK = 32
"""Rows of the rotation loaded at a time: all of them do not fit the shared memory at 256 dimensions."""


class PageCodes:
    """Summaries of slots, on the device.

    Parameters
    ----------
    words : torch.Tensor
        int64 (S,).
    signs, fine : torch.Tensor
        int16 (S, D); `fine` may be page-locked.
    means : torch.Tensor
        uint8 (S, D / 2).
    shares : torch.Tensor
        uint8 (S, 16).
    numbers : torch.Tensor
        float32 (3, S).
    """

    __slots__ = ("fine", "means", "numbers", "shares", "signs", "words")

    def __init__(
        self,
        words: torch.Tensor,
        signs: torch.Tensor,
        fine: torch.Tensor,
        means: torch.Tensor,
        shares: torch.Tensor,
        numbers: torch.Tensor,
    ) -> None:
        self.words, self.signs, self.fine = words, signs, fine
        self.means, self.shares, self.numbers = means, shares, numbers

    def part(self, first: int, stop: int) -> PageCodes:
        """View some slots."""
        at = slice(first, stop)
        lie_together = self.signs[at], self.fine[at], self.means[at], self.shares[at]
        return PageCodes(self.words[at], *lie_together, self.numbers[:, at])

    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All parts, in the order of the parameters."""
        return self.words, self.signs, self.fine, self.means, self.shares, self.numbers

    def nbytes(self) -> int:
        """Bytes on the device that holds the signs."""
        return sum(t.nbytes for t in self.tensors() if t.device == self.signs.device)


def slot_bytes(bits: int, dim: int) -> int:
    """Bytes of one slot that holds so many bits an element."""
    return 8 + 2 * bits * dim + dim // 2 + PAGE_TOKENS + 12


def empty_codes(n_slots: int, dim: int, device: torch.device, fine: torch.Tensor | None = None) -> PageCodes:
    """Slots without a page.

    Parameters
    ----------
    fine : torch.Tensor or None
        Memory that is to hold it: zeros, int16 (S, D). None: memory of the device.

    Raises
    ------
    ValueError
        If `dim` is odd, or `fine` does not fit.
    """
    if dim % 2:
        msg = f"dim: expected an even number, got {dim}"
        raise ValueError(msg)
    signs = torch.zeros(n_slots, dim, dtype=torch.int16, device=device)
    fine = torch.zeros_like(signs) if fine is None else fine
    if fine.shape != signs.shape or fine.dtype != signs.dtype or not fine.is_contiguous():
        msg = f"fine: expected contiguous {tuple(signs.shape)} of int16, got {tuple(fine.shape)} of {fine.dtype}"
        raise ValueError(msg)
    return PageCodes(
        words=torch.zeros(n_slots, dtype=torch.int64, device=device),
        signs=signs,
        fine=fine,
        means=torch.zeros(n_slots, dim // 2, dtype=torch.uint8, device=device),
        shares=torch.zeros(n_slots, PAGE_TOKENS, dtype=torch.uint8, device=device),
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
    signs_ptr,  # [S, D]
    fine_ptr,  # [S, D]
    means_ptr,  # [S, D / 2]
    shares_ptr,  # [S, 16]
    numbers_ptr,  # [3, S]
    n_slots,  # S
    like_ptr,  # anything of the pages' dtype
    STEP: tl.constexpr,
    D: tl.constexpr,
    DP: tl.constexpr,
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
        width = STEP * tl.sqrt(square / D)
        inverse_width = tl.where(width > 0.0, 1.0 / width, 0.0)
        code = tl.minimum(tl.maximum(tl.floor(x * inverse_width[:, None]).to(tl.int32) + 2, 0), 3)
        v = tl.where((d < D)[None, :], (2 * code - 3).to(tl.float32), 0.0)
        along = tl.sum(v * x, 1)
        fit = along / tl.sum(v * v, 1)
        step = tl.max(fit, 0)  # of a token that is not live it is 0
        share = tl.where(step > 0.0, 255.0 * fit / step, 0.0)
        distance = tl.sqrt(tl.max(tl.maximum(square - fit * along, 0.0), 0))
        signs = tl.sum(((code >> 1) ^ 1) << t[:, None], 0)
        fine = tl.sum(((code & 1) ^ 1) << t[:, None], 0)
        tl.store(signs_ptr + slot * D + d, signs.to(tl.int16), mask=d < D)
        tl.store(fine_ptr + slot * D + d, fine.to(tl.int16), mask=d < D)
        low, high = tl.split(tl.reshape((level + 8.0).to(tl.int32), [DP // 2, 2]))
        j = tl.arange(0, DP // 2)
        tl.store(means_ptr + slot * (D // 2) + j, (low | (high << 4)).to(tl.uint8), mask=j < D // 2)
        tl.store(shares_ptr + slot * T + t, tl.floor(share + 0.5).to(tl.uint8))
        tl.store(numbers_ptr + slot, scale)
        tl.store(numbers_ptr + n_slots + slot, step)
        tl.store(numbers_ptr + 2 * n_slots + slot, distance)


@torch.library.custom_op("icecache::page_codes", mutates_args=("words", "signs", "fine", "means", "shares", "numbers"))
def _page_codes(
    slots: torch.Tensor,
    new: torch.Tensor,
    rotation: torch.Tensor,
    like: torch.Tensor,
    words: torch.Tensor,
    signs: torch.Tensor,
    fine: torch.Tensor,
    means: torch.Tensor,
    shares: torch.Tensor,
    numbers: torch.Tensor,
) -> None:
    dim = signs.shape[1]
    _page_codes_kernel[(slots.numel(),)](
        slots,
        new,
        rotation,
        words,
        signs,
        fine,
        means,
        shares,
        numbers,
        words.numel(),
        like,
        STEP=STEP_OF_DEVIATION,
        D=dim,
        DP=max(16, triton.next_power_of_2(dim)),
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
    signs: torch.Tensor,
    fine: torch.Tensor,
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
    dim = codes.signs.shape[1]
    if tuple(rotation.shape) != (dim, dim) or rotation.dtype != torch.float32 or not rotation.is_contiguous():
        msg = f"rotation: expected contiguous ({dim}, {dim}) float32, got {tuple(rotation.shape)} {rotation.dtype}"
        raise ValueError(msg)
    if slots.numel():
        _page_codes(slots.contiguous(), words.contiguous(), rotation, like, *codes.tensors())


def page_codes_ref(
    codes: PageCodes, slots: torch.Tensor, words: torch.Tensor, rotation: torch.Tensor, keys: torch.Tensor
) -> None:
    """Plain torch version of `page_codes`; `keys` (n, 16, D) are those of the pages that `words` name."""
    codes.words[slots] = words
    there = words != 0
    slots, words, keys = slots[there], words[there], keys[there].double()
    dim = codes.signs.shape[1]
    token = torch.arange(PAGE_TOKENS, device=words.device)
    live = ((words[:, None] >> (48 + token)) & 1).bool()[..., None]
    rotated = torch.where(live, keys, 0.0) @ rotation.double()
    mean = rotated.sum(1) / live.sum(1)
    scale = mean.abs().amax(1, keepdim=True) / 7
    level = torch.floor(torch.nan_to_num(mean / scale) + 0.5).clamp(-7, 7)
    x = torch.where(live, rotated - (level * scale)[:, None], 0.0)
    width = STEP_OF_DEVIATION * (x.square().sum(2, keepdim=True) / dim).sqrt()
    code = (torch.floor(torch.nan_to_num(x / width)).long() + 2).clamp(0, 3)
    v = (2 * code - 3).double()
    fit = (v * x).sum(2) / v.square().sum(2)
    step = fit.amax(1, keepdim=True)
    for plane, digit in ((codes.signs, code >> 1), (codes.fine, code & 1)):
        bits = ((1 - digit) << token[:, None]).sum(1)
        plane[slots] = torch.where(bits >= 2**15, bits - 2**16, bits).to(torch.int16)
    byte = level.long() + 8
    codes.means[slots] = (byte[:, ::2] | (byte[:, 1::2] << 4)).to(torch.uint8)
    codes.shares[slots] = torch.floor(torch.nan_to_num(255 * fit / step) + 0.5).to(torch.uint8)
    distance = (x - fit[..., None] * v).square().sum(2)
    distance = torch.where(live[..., 0], distance, 0.0).amax(1).sqrt()
    codes.numbers[:, slots] = torch.stack([scale[:, 0], step[:, 0], distance]).float()


def decoded(codes: PageCodes, slots: torch.Tensor, *, fine: bool = True) -> torch.Tensor:
    """Rotated keys (n, 16, D) float32 as the summaries of `slots` have them, or as their signs alone do."""
    token = torch.arange(PAGE_TOKENS, device=slots.device)[:, None]
    signs, rest = (
        1 - 2 * ((x.to(slots.device)[slots].long()[:, None] >> token) & 1) for x in (codes.signs, codes.fine)
    )
    v = (2 * signs + rest).float() if fine else SIGN_STEP * signs
    byte = codes.means[slots].long()
    level = torch.stack([byte & 15, byte >> 4], -1).flatten(1) - 8
    scale, step, _ = codes.numbers[:, slots]
    fit = step[:, None] * codes.shares[slots].float() / 255
    return (level * scale[:, None])[:, None] + fit[..., None] * v
