"""Tokens on their way from the device into forests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from icecache import _core
from icecache.errors import BadTensorError, PoolExhaustedError
from icecache.pages.store import as_bytes
from icecache.stats import Recorder


@dataclass(frozen=True, slots=True)
class Move:
    """Tokens on their way to one forest, as host tensors ``[H, n, D]``."""

    layer: int
    row: int
    forest: _core.Forest
    keys: torch.Tensor
    values: torch.Tensor


def insert(pool: _core.Pool, recorder: Recorder, moves: Sequence[Move]) -> None:
    """Put tokens into their forests, all or nothing per row.

    Raises
    ------
    BadTensorError
        If keys or values hold NaN or infinity; names the layer and the row.
    PoolExhaustedError
        If the page store's limit is reached.
    """
    by_shape: dict[tuple[int, int, torch.dtype], list[Move]] = {}
    for move in moves:
        by_shape.setdefault((move.keys.shape[-1], move.values.shape[-1], move.keys.dtype), []).append(move)
    for group in by_shape.values():
        keys, values = [as_bytes(m.keys) for m in group], [as_bytes(m.values) for m in group]
        try:
            with recorder.part("index_build"):
                _core.extend(pool, [m.forest for m in group], keys, values)
        except MemoryError as error:
            raise PoolExhaustedError(str(error)) from error
        except ValueError as error:
            for m in group:
                if not bool(torch.isfinite(m.keys).all()):
                    msg = f"layer {m.layer}, row {m.row}: keys hold NaN or infinity; the index is unchanged"
                    raise BadTensorError(msg) from error
            raise
        recorder.bytes_to_host += sum(a.nbytes for a in keys) + sum(a.nbytes for a in values)
