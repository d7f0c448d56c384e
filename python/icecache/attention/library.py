"""Attention of many queries to a long part of the keys by cuDNN, where that is faster than our own kernel.

Dimension key: H KV heads, G query heads per KV head, Q queries, N keys, D head dim.

On an H200 (bfloat16, heads of 128, 8192 queries, 32,768 keys) it reaches 680 TFLOP/s, ours 539 and the flash kernel of
torch 345 (benches/results/chunks-h200). But it plans every new pair of lengths, which takes the host 62 ms.
"""

from __future__ import annotations

import torch


def serves(query: torch.Tensor, values: torch.Tensor, softcap: float | None) -> bool:
    """Whether cuDNN has a fast kernel for such queries (H, G, Q, D) and values (H, N, Dv)."""
    return (
        query.is_cuda
        and softcap is None
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] == values.shape[-1]
        and query.shape[-1] in (64, 128)
        and torch.version.hip is None
        and torch.cuda.get_device_capability(query.device) >= (9, 0)
        and bool(torch.backends.cudnn.is_available())  # type: ignore[no-untyped-call]
        and bool(torch.backends.cuda.cudnn_sdp_enabled())  # type: ignore[no-untyped-call]
    )


def library_attention(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend with all queries to all keys.

    Parameters
    ----------
    query : torch.Tensor
        (H, G, Q, D), as `serves` has it.
    keys, values : torch.Tensor
        (H, N, D).

    Returns
    -------
    torch.Tensor, torch.Tensor
        Output (H, G, Q, D) in the query's dtype, any strides, and log-sum-exp float32 (H, G, Q), natural logarithm.
    """
    n_heads, group, n_queries, dim = query.shape
    wide = [t[:, None].expand(n_heads, group, -1, dim) for t in (keys, values)]  # views: heads of a group share them
    found = torch.ops.aten._scaled_dot_product_cudnn_attention(query, *wide, None, True, 0.0, False, scale=scaling)
    out, lse = found[:2]
    return out, lse.reshape(n_heads, group, n_queries).contiguous()
