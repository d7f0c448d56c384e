"""Queries as the search of page summaries wants them: rotated, of length one, and their lengths.

Dimension key: B sequences, H KV heads, G query heads per KV head, D key dim.

    unit[b, h, g] = q[b, h, g] @ rotation / length,   length[b, h, g] = |q[b, h, g]|

A zero query gives zeros. Unit queries are float16: no element passes 1 and the error is below .0005 of the length.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _rotate_queries_kernel(
    q_ptr,  # [B, H, G, D]
    rotation_ptr,  # [D, D] float32
    unit_ptr,  # [B, H, G, D] float16
    length_ptr,  # [B, H, G] float32
    G: tl.constexpr,
    GP: tl.constexpr,
    D: tl.constexpr,
    CB: tl.constexpr,
    KB: tl.constexpr,
):
    """One program per (sequence and KV head, columns). The rotation keeps lengths, so each program sums them itself."""
    bh = tl.program_id(0).to(tl.int64)
    g = tl.arange(0, GP)
    d = tl.program_id(1) * CB + tl.arange(0, CB)
    rotated = tl.zeros([GP, CB], tl.float32)
    square = tl.zeros([GP], tl.float32)
    for first in range(0, D, KB):
        i = first + tl.arange(0, KB)
        q = tl.load(q_ptr + (bh * G + g)[:, None] * D + i[None, :], mask=(g < G)[:, None] & (i < D)[None, :], other=0.0)
        q = q.to(tl.float32)
        turn = tl.load(rotation_ptr + i[:, None] * D + d[None, :], mask=(i < D)[:, None] & (d < D)[None, :], other=0.0)
        rotated += tl.dot(q, turn, input_precision="ieee")
        square += tl.sum(q * q, 1)
    length = tl.sqrt(square)
    unit = rotated / tl.where(length == 0.0, 1.0, length)[:, None]
    inside = (g < G)[:, None] & (d < D)[None, :]
    tl.store(unit_ptr + (bh * G + g)[:, None] * D + d[None, :], unit.to(tl.float16), mask=inside)
    tl.store(length_ptr + bh * G + g, length, mask=g < tl.where(tl.program_id(1) == 0, G, 0))


@torch.library.custom_op("icecache::rotate_queries", mutates_args=("unit", "length"))
def _rotate_queries(q: torch.Tensor, rotation: torch.Tensor, unit: torch.Tensor, length: torch.Tensor) -> None:
    b, h, g, d = q.shape
    _rotate_queries_kernel[(b * h, triton.cdiv(d, 32))](
        q,
        rotation,
        unit,
        length,
        G=g,
        GP=max(16, triton.next_power_of_2(g)),
        D=d,
        CB=32,
        KB=32,
        num_warps=4,
    )


@_rotate_queries.register_fake
def _(q: torch.Tensor, rotation: torch.Tensor, unit: torch.Tensor, length: torch.Tensor) -> None:
    return None


def rotate_queries(q: torch.Tensor, rotation: torch.Tensor, unit: torch.Tensor, length: torch.Tensor) -> None:
    """Fill `unit` and `length`; see the module docstring.

    Parameters
    ----------
    q : torch.Tensor
        ``(B, H, G, D)``, contiguous.
    rotation : torch.Tensor
        float32 ``(D, D)``, contiguous.
    unit, length : torch.Tensor
        float16 ``(B, H, G, D)`` and float32 ``(B, H, G)``, contiguous; written.

    Raises
    ------
    ValueError
        If a shape, dtype or memory layout differs from the above.
    """
    d = q.shape[3]
    expected = (
        ("q", q, q.shape, q.dtype),
        ("rotation", rotation, (d, d), torch.float32),
        ("unit", unit, q.shape, torch.float16),
        ("length", length, q.shape[:3], torch.float32),
    )
    for name, tensor, shape, dtype in expected:
        if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype or not tensor.is_contiguous():
            msg = f"{name}: expected contiguous {tuple(shape)} of {dtype}, got {tuple(tensor.shape)} of {tensor.dtype}"
            raise ValueError(msg)
    _rotate_queries(q, rotation, unit, length)


def rotate_queries_ref(q: torch.Tensor, rotation: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Plain torch version of `rotate_queries` in float64: unit queries and lengths."""
    rotated = q.double() @ rotation.double()
    length = rotated.norm(dim=-1)
    return rotated / torch.where(length == 0, 1.0, length)[..., None], length
