"""Layers without pages in a captured decode step: their keys and values in device buffers whose address stays.

Dimension key: L layers, B rows, H KV heads, G query heads per KV head, C columns, n columns in use, D key dim,
E value dim.

A dense layer keeps every position, one with a sliding window the newest ``window - 1`` and the one under way. The cache
layer stays transformers' own: its ``keys`` and ``values`` become views of the columns in use, so whatever else happens
to it (a crop, a copy, a step that runs op by op) needs nothing of us: a crop makes shorter views, everything else makes
tensors outside of the buffers, which come back before the next captured step.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

ROOM_PART = 8
"""A context may grow by this part before its buffer does; then the step is captured anew."""
ROOM_COLUMNS = 1024
"""At least so many columns of room. A window moves back to the first columns once in as many steps."""


class KeptLayer(Protocol):
    """What we need of a cache layer that keeps keys ``(B, H, n, D)`` and values ``(B, H, n, E)`` on the device."""

    keys: torch.Tensor
    values: torch.Tensor

    def get_seq_length(self) -> int:
        """Positions; those that a window has left behind included."""
        ...


@dataclass(frozen=True, slots=True)
class StaticShape:
    """What a buffer is made for.

    Parameters
    ----------
    layer : int
        Number of the layer in the model.
    window : int or None
        Positions that a query sees, its own included; None: all.
    """

    layer: int
    n_rows: int
    n_kv_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device
    window: int | None

    @classmethod
    def of(cls, layer: int, kept: KeptLayer, window: int | None) -> StaticShape:
        """Shape of what `kept` holds."""
        n_rows, n_kv_heads, _, key_dim = kept.keys.shape
        value_dim, like = kept.values.shape[3], kept.keys
        return cls(layer, n_rows, n_kv_heads, key_dim, value_dim, like.dtype, like.device, window)

    def n_columns(self, n: int) -> int:
        """Columns to make for `n` in use."""
        most = n if self.window is None else max(n, self.window - 1)
        return most + 1 + (ROOM_COLUMNS if self.window is not None else max(ROOM_COLUMNS, most // ROOM_PART))

    def empty(self, n_columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Buffers of so many columns."""
        # Not in inference mode: in-place writes from outside of it would be refused.
        with torch.inference_mode(mode=False):
            lead = (self.n_rows, self.n_kv_heads, n_columns)
            keys = torch.zeros(*lead, self.key_dim, dtype=self.dtype, device=self.device)
            return keys, torch.zeros(*lead, self.value_dim, dtype=self.dtype, device=self.device)


class StaticLayer:
    """Buffers of one layer, and whose keys and values are in them."""

    def __init__(self, shape: StaticShape) -> None:
        self.shape = shape
        self.keys, self.values = shape.empty(0)
        self._held: weakref.ref[KeptLayer] | None = None

    def nbytes(self) -> int:
        """Bytes on the device."""
        return self.keys.nbytes + self.values.nbytes

    def hold(self, kept: KeptLayer) -> bool:
        """Move `kept` into the buffers, with a free column behind it, unless it is there.

        Returns
        -------
        bool
            Whether the buffers were replaced by larger ones.
        """
        if self._holder() is kept and self._inside(kept) and self.used(kept)[1] < self.keys.shape[2]:
            return False
        if self._holder() is not kept:
            self.release()
        n, grown = kept.keys.shape[2], False
        keys, values = kept.keys, kept.values
        if self._inside(kept):  # source and target may overlap
            keys, values = keys.clone(), values.clone()
        if n + 1 > self.keys.shape[2]:
            self.keys, self.values = self.shape.empty(self.shape.n_columns(n))
            grown = True
        self.keys[:, :, :n], self.values[:, :, :n] = keys, values
        self._held = weakref.ref(kept)
        self._give(kept, 0, n)
        return grown

    def used(self, kept: KeptLayer) -> tuple[int, int]:
        """First column of `kept`, which lives here, and the one behind its last."""
        first = int(kept.keys.storage_offset()) // self.shape.key_dim
        return first, first + kept.keys.shape[2]

    def count_one(self, kept: KeptLayer) -> None:
        """Count the column that a step has written behind the last one of `kept`."""
        first, stop = self.used(kept)
        if self.shape.window is None:
            self._give(kept, first, stop + 1)
            return
        first = max(first, stop + 1 - (self.shape.window - 1))
        self._give(kept, first, stop + 1, cumulative_length=kept.get_seq_length() + 1)

    def release(self) -> None:
        """Give whoever lives here memory of its own."""
        held = self._holder()
        if held is not None and self._inside(held):
            held.keys, held.values = held.keys.clone(), held.values.clone()
        self._held = None

    def _holder(self) -> KeptLayer | None:
        return None if self._held is None else self._held()

    def _inside(self, kept: KeptLayer) -> bool:
        own, other = self.keys.untyped_storage(), kept.keys.untyped_storage()
        return self.keys.numel() > 0 and own.data_ptr() == other.data_ptr()

    def _give(self, kept: KeptLayer, first: int, stop: int, **more: int) -> None:
        # One call, so that Ctrl-C finds all of it done or nothing.
        vars(kept).update(keys=self.keys[:, :, first:stop], values=self.values[:, :, first:stop], **more)


class StaticKV:
    """Layers without pages in the steps of one shape.

    Parameters
    ----------
    shapes : sequence of StaticShape
        One per layer, all of the same rows and device.
    """

    def __init__(self, shapes: Sequence[StaticShape]) -> None:
        first = shapes[0]
        self.layers = [StaticLayer(shape) for shape in shapes]
        self._index = {shape.layer: i for i, shape in enumerate(shapes)}
        with torch.inference_mode(mode=False):
            size = len(shapes), first.n_rows, 3
            self._bounds = torch.zeros(size, dtype=torch.int32, device=first.device)
            self._host = torch.zeros(size, dtype=torch.int32, pin_memory=first.device.type == "cuda")
            self._no_pages: dict[int, torch.Tensor] = {}
            for shape in shapes:
                table = torch.zeros(shape.n_rows, shape.n_kv_heads, 0, dtype=torch.int64, device=shape.device)
                self._no_pages[shape.layer] = table

    def nbytes(self) -> int:
        """Bytes on the device."""
        return self._bounds.nbytes + sum(layer.nbytes() for layer in self.layers)

    def hold(self, kept: Sequence[KeptLayer]) -> bool:
        """Move every layer into its buffers; returns whether some buffers were replaced."""
        return any([layer.hold(x) for layer, x in zip(self.layers, kept, strict=True)])  # noqa: C419 - all of them

    def release(self) -> None:
        """Give whoever lives here memory of its own."""
        for layer in self.layers:
            layer.release()

    def write_bounds(self, kept: Sequence[KeptLayer], length: int, pads: Sequence[int]) -> None:
        """Say which columns the next step attends to, the newest token's included.

        Asynchronous on the current stream; the step before must be over, because its copy may still be under way.

        Parameters
        ----------
        length : int
            Positions before the step, padding included.
        pads : sequence of int
            Per row, positions of padding before its first token.
        """
        for layer, x, rows in zip(self.layers, kept, self._host, strict=True):
            first, stop = layer.used(x)
            before = length - (stop - first)  # position of the first column
            seen = first if layer.shape.window is None else max(first, stop + 1 - layer.shape.window)
            starts = [max(seen, first + pad - before) for pad in pads]
            rows.copy_(torch.tensor([(0, start, stop + 1) for start in starts], dtype=torch.int32))
        self._bounds.copy_(self._host, non_blocking=True)

    def count_one(self, kept: Sequence[KeptLayer]) -> None:
        """Count the token that a step has written into every layer."""
        for layer, x in zip(self.layers, kept, strict=True):
            layer.count_one(x)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float,
        softcap: float | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write the newest token behind the others and attend with its query.

        Parameters
        ----------
        layer : int
            Number of the layer in the model.
        query : torch.Tensor
            (B, H * G, 1, D), post-RoPE.
        keys, values : torch.Tensor
            (B, H, 1, D) and (B, H, 1, E).

        Returns
        -------
        out, lse : torch.Tensor
            (B, 1, H * G, E) in the query's dtype, and its log-sum-exp (B, H, G). Asynchronous.
        """
        from icecache.kernels.paged_decode import paged_decode  # triton: only where there is a device
        from icecache.kernels.window_append import window_append

        index = self._index[layer]
        buffer, bounds = self.layers[index], self._bounds[index]
        shape = buffer.shape
        grouped = query.reshape(shape.n_rows, shape.n_kv_heads, -1, shape.key_dim).contiguous()
        window_append(keys, values, buffer.keys, buffer.values, bounds)
        table = self._no_pages[layer]
        out, lse = paged_decode(grouped, buffer.keys, buffer.values, bounds, table, scaling, softcap=softcap)
        return out.reshape(shape.n_rows, 1, -1, shape.value_dim), lse
