"""The mailbox of a decode step as tensors: what kernels write queries to and read pages from.

Dimension key: L layers that search, R rows, H KV heads, G query heads per KV head, D key dim, C pages of an answer.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from math import prod

import torch

from icecache import _core

_TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

ADDRESS_BITS = 48
"""Lower bits of a table word: the address of the page. The upper 16 say which slots are live."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MailboxShape:
    """Axes of a mailbox; `dtype` ("float32", "float16", "bfloat16") is that of the queries."""

    n_layers: int
    n_rows: int
    n_kv_heads: int
    group: int
    key_dim: int
    capacity: int
    dtype: str


@dataclass(frozen=True, slots=True)
class MailboxTensors:
    """Views of a mailbox's memory, not copied; each keeps the mailbox alive. Tickets are compared for equality.

    Parameters
    ----------
    ticket : torch.Tensor
        int32 (1,): the step in flight. Written by the host.
    request : torch.Tensor
        int32 (L,), strided: the device writes the ticket after the queries of a layer (release, system scope).
    queries : torch.Tensor
        (L, R, H, G, D), post-RoPE. Written by the device.
    answered : torch.Tensor
        int32 (L,), strided: the ticket, once every (row, head) of the layer is answered (release).
    unit_answered : torch.Tensor
        int32 (L, R, H): the same per (row, head).
    table : torch.Tensor
        int64 (L, R, H, C): page words, best first, then zeros. Bits 0-47: address of the page, keys then values; bit
        48 + s: slot s holds a live token.
    lse : torch.Tensor
        float32 (L, R, H, G, 2): log-sum-exp of the scaled logits of all pages and of the chosen ones.
    timeout : torch.Tensor
        int32 (L,), strided: the device writes the ticket when it stops waiting for a layer.
    """

    ticket: torch.Tensor
    request: torch.Tensor
    queries: torch.Tensor
    answered: torch.Tensor
    unit_answered: torch.Tensor
    table: torch.Tensor
    lse: torch.Tensor
    timeout: torch.Tensor


def open_mailbox(
    engine: _core.Engine, memory: _core.HostMemory, shape: MailboxShape
) -> tuple[_core.Mailbox, MailboxTensors]:
    """Make a mailbox and view its memory.

    Raises
    ------
    ValueError
        If an axis is out of range.
    MemoryError
        If `memory` has no room.
    """
    mailbox = engine.mailbox(memory, **asdict(shape))
    flat, arrays = torch.from_numpy(mailbox.memory), mailbox.arrays

    def view(name: str, n: int, kind: torch.dtype, *inner: int) -> torch.Tensor:
        offset, stride = arrays[name]
        blocks = flat[offset : offset + n * stride].view(n, stride)[:, : prod(inner) * kind.itemsize]
        return blocks.view(kind).view(n, *inner)

    layers, units = shape.n_layers, (shape.n_rows, shape.n_kv_heads)
    return mailbox, MailboxTensors(
        ticket=view("ticket", 1, torch.int32),
        request=view("request", layers, torch.int32),
        queries=view("queries", layers, _TORCH_DTYPES[shape.dtype], *units, shape.group, shape.key_dim),
        answered=view("answered", layers, torch.int32),
        unit_answered=view("unit_answered", layers, torch.int32, *units),
        table=view("table", layers, torch.int64, *units, shape.capacity),
        lse=view("lse", layers, torch.float32, *units, shape.group, 2),
        timeout=view("timeout", layers, torch.int32),
    )
