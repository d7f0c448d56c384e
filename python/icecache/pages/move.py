"""Tokens on their way from the device into forests."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from icecache import _core
from icecache.errors import BadTensorError, PoolExhaustedError
from icecache.pages.shelf import Pair
from icecache.pages.store import as_bytes
from icecache.stats import Recorder


@dataclass(frozen=True, slots=True)
class Move:
    """Tokens on their way to one forest, as host tensors.

    Keys ``[H, n, D]`` are those of the leading layer `layer`, values ``[H, n, row_dim]`` whatever else a row holds.
    """

    layer: int
    row: int
    forest: _core.Forest
    keys: torch.Tensor
    values: torch.Tensor
    followers: tuple[int, ...] = ()
    """The other layers whose keys are in `values`; empty if they have been checked."""


def check_followers(layers: Sequence[int], row: int, pairs: Sequence[Pair]) -> None:
    """Raise BadTensorError if keys of a layer behind the leader hold NaN or infinity; the index sees the leader's only.

    Parameters
    ----------
    layers : sequence of int
        Layers of the model that share pages, the leader first.
    pairs : sequence of (torch.Tensor, torch.Tensor)
        Their keys and values.
    """
    for layer, (keys, _) in zip(layers[1:], pairs[1:], strict=True):
        low, high = torch.aminmax(keys)
        if not bool(torch.isfinite(low) & torch.isfinite(high)):  # sync: tokens are about to leave the device
            msg = f"layer {layer}, row {row}: keys hold NaN or infinity; the index is unchanged"
            raise BadTensorError(msg)


def _check(move: Move) -> None:
    n, key_dim = len(move.followers), move.keys.shape[-1]
    if n:
        pair_dim = (move.values.shape[-1] + key_dim) // (n + 1)
        starts = range(pair_dim - key_dim, move.values.shape[-1], pair_dim)
        pairs = [(move.values[..., start : start + key_dim], move.values) for start in starts]
        check_followers((move.layer, *move.followers), move.row, [(move.keys, move.values), *pairs])


def insert(pool: _core.Pool, recorder: Recorder, moves: Sequence[Move]) -> None:
    """Put tokens into their forests, all or nothing per row.

    Raises
    ------
    BadTensorError
        If keys or values hold NaN or infinity; names the layer and the row.
    PoolExhaustedError
        If the page store's limit is reached.
    """
    for move in moves:
        _check(move)
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
