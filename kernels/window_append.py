"""Write the key and value of the newest token into its column of the near buffer.

Dimension key: B sequences, H KV heads, C columns, D key dim, E value dim.

    near_keys[b, h, stop[b] - 1] = keys[b, h, 0],   near_values[b, h, stop[b] - 1] = values[b, h, 0]

The column comes from device memory (`bounds`, as `paged_decode` reads it: the newest token is already counted), so one
captured launch serves every step.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _window_append_kernel(
    k_ptr,  # [B, H, 1, D]
    v_ptr,  # [B, H, 1, E]
    near_k_ptr,  # [B, H, C, D]
    near_v_ptr,  # [B, H, C, E]
    bounds_ptr,  # [B, 3] int32
    n_heads,
    n_columns,
    stride_kb,
    stride_kh,
    stride_vb,
    stride_vh,
    stride_nkb,
    stride_nkh,
    stride_nkc,
    stride_nvb,
    stride_nvh,
    stride_nvc,
    D: tl.constexpr,
    DP: tl.constexpr,
    E: tl.constexpr,
    EP: tl.constexpr,
):
    """One program per sequence and KV head. A column outside of the buffer is not written."""
    bh = tl.program_id(0).to(tl.int64)
    b = bh // n_heads
    h = bh % n_heads
    column = tl.load(bounds_ptr + b * 3 + 2).to(tl.int64) - 1
    inside = (column >= 0) & (column < n_columns)
    d = tl.arange(0, DP)
    e = tl.arange(0, EP)
    k = tl.load(k_ptr + b * stride_kb + h * stride_kh + d, mask=d < D, other=0.0)
    v = tl.load(v_ptr + b * stride_vb + h * stride_vh + e, mask=e < E, other=0.0)
    tl.store(near_k_ptr + b * stride_nkb + h * stride_nkh + column * stride_nkc + d, k, mask=d < tl.where(inside, D, 0))
    tl.store(near_v_ptr + b * stride_nvb + h * stride_nvh + column * stride_nvc + e, v, mask=e < tl.where(inside, E, 0))


@torch.library.custom_op("icecache::window_append", mutates_args=("near_keys", "near_values"))
def _window_append(
    keys: torch.Tensor,
    values: torch.Tensor,
    near_keys: torch.Tensor,
    near_values: torch.Tensor,
    bounds: torch.Tensor,
) -> None:
    b, h, n_columns, d = near_keys.shape
    value_dim = near_values.shape[3]
    _window_append_kernel[(b * h,)](
        keys,
        values,
        near_keys,
        near_values,
        bounds,
        h,
        n_columns,
        *keys.stride()[:2],
        *values.stride()[:2],
        *near_keys.stride()[:3],
        *near_values.stride()[:3],
        D=d,
        DP=triton.next_power_of_2(d),
        E=value_dim,
        EP=triton.next_power_of_2(value_dim),
        num_warps=1,
    )


@_window_append.register_fake
def _(
    keys: torch.Tensor,
    values: torch.Tensor,
    near_keys: torch.Tensor,
    near_values: torch.Tensor,
    bounds: torch.Tensor,
) -> None:
    return None


def window_append(
    keys: torch.Tensor, values: torch.Tensor, near_keys: torch.Tensor, near_values: torch.Tensor, bounds: torch.Tensor
) -> None:
    """Write one token of every row in place; see the module docstring.

    Parameters
    ----------
    keys, values : torch.Tensor
        ``(B, H, 1, D)`` and ``(B, H, 1, E)``, last dimension contiguous.
    near_keys, near_values : torch.Tensor
        ``(B, H, C, D)`` and ``(B, H, C, E)``, dtype and device of `keys`, last dimension contiguous.
    bounds : torch.Tensor
        ``(B, 3)`` int32, contiguous; the last entry of a row is one more than the column to write.

    Raises
    ------
    ValueError
        If a shape, dtype or memory layout differs from the above. A column outside of the buffer is not written.
    """
    b, h, _, d = near_keys.shape
    value_dim = near_values.shape[3]
    expected = (
        ("keys", keys, (b, h, 1, d)),
        ("values", values, (b, h, 1, value_dim)),
        ("near_values", near_values, (b, h, near_keys.shape[2], value_dim)),
    )
    for name, tensor, shape in expected:
        if tuple(tensor.shape) != shape or tensor.stride(3) != 1 or tensor.dtype != near_keys.dtype:
            msg = f"{name}: expected {shape} of {near_keys.dtype}, got {tuple(tensor.shape)} of {tensor.dtype}"
            raise ValueError(msg)
    if tuple(bounds.shape) != (b, 3) or bounds.dtype != torch.int32 or not bounds.is_contiguous():
        msg = f"bounds: expected a contiguous ({b}, 3) int32 tensor, got {tuple(bounds.shape)} {bounds.dtype}"
        raise ValueError(msg)
    _window_append(keys, values, near_keys, near_values, bounds)


def window_append_ref(
    keys: torch.Tensor, values: torch.Tensor, near_keys: torch.Tensor, near_values: torch.Tensor, bounds: torch.Tensor
) -> None:
    """Plain torch version of `window_append`."""
    for b, stop in enumerate(bounds[:, 2].tolist()):
        if 0 < stop <= near_keys.shape[2]:
            near_keys[b, :, stop - 1] = keys[b, :, 0]
            near_values[b, :, stop - 1] = values[b, :, 0]
