"""A decode step that stays on the device: static buffers and the attention over them, ready for a CUDA graph.

Dimension key: L layers, B rows, H KV heads, G query heads per KV head, C columns, K pages a head, D head dim.

The host only writes `state` before a step and reads the answer's flag after it. Whatever changes from step to step is
read from memory: the ticket and the columns from `state`, the pages from the mailbox, the token from its input.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from icecache.attention.static_kv import StaticKV, StaticShape
from icecache.pages import page_strides, row_dim
from icecache.pages.near import NearBuffer
from icecache.transfer import MailboxTensors

if TYPE_CHECKING:
    from icecache.attention.finder import PageFinder

SLACK_COLUMNS = 96
"""Columns beyond what the near tokens need: gaps in the window are closed once in as many steps."""


def shared_sizes(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Give `StepShape.shared` for groups of layers of these sizes."""
    return () if set(sizes) == {1} else sizes


@dataclass(frozen=True, slots=True)
class StepShape:
    """What a step is built for."""

    n_layers: int
    n_rows: int
    n_kv_heads: int
    group: int
    key_dim: int
    value_dim: int
    n_pages: int
    """Places of the page table, per head."""
    near_tokens: int
    """Most near tokens, the newest included."""
    dtype: torch.dtype
    device: torch.device
    shared: tuple[int, ...] = ()
    """Layers of each group that shares pages, in order; empty: no layer shares any."""
    numbers: tuple[int, ...] = ()
    """Numbers of these layers in the model; empty: all there are, in order."""
    static: tuple[StaticShape, ...] = ()
    """The layers without pages."""
    estimates: bool = False
    """Whether pages that are not read are estimated; not where layers share pages."""

    def number(self, layer: int) -> int:
        """Give the number in the model of the `layer`-th layer with pages."""
        return self.numbers[layer] if self.numbers else layer

    def index(self, number: int) -> int:
        """Inverse of `number`."""
        return self.numbers.index(number) if self.numbers else number

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Layers of each group; one search, and one page table, serves a group."""
        return self.shared or (1,) * self.n_layers

    @property
    def n_searches(self) -> int:
        """Groups of layers."""
        return len(self.group_sizes)

    @property
    def leaders(self) -> list[int]:
        """First layer of each group."""
        return list(itertools.accumulate(self.group_sizes, initial=0))[:-1]

    def place_of(self, layer: int) -> tuple[int, int]:
        """Group of a layer, and its place there; 0 leads."""
        group = bisect.bisect_right(self.leaders, layer) - 1
        return group, layer - self.leaders[group]

    def row_dim(self, group: int) -> int:
        """Elements of a page's row behind the leader's key."""
        return row_dim(self.key_dim, self.value_dim, self.group_sizes[group])

    def page_strides(self, layer: int) -> tuple[int, int, int, int]:
        """Elements from the address of a page to the first key of a layer, from key to key, and for its values."""
        group, place = self.place_of(layer)
        return page_strides(place, self.key_dim, self.value_dim, self.group_sizes[group])


class DeviceStep:
    """Buffers and attention of one decode step for one batch size.

    Parameters
    ----------
    shape : StepShape
    mailbox : MailboxTensors or None
        None: the finder fills `table`, or without one it holds the pages to read.
    """

    def __init__(self, shape: StepShape, mailbox: MailboxTensors | None) -> None:
        self.shape, self.mailbox = shape, mailbox
        self.finder: PageFinder | None = None
        """Searches on the device; whoever replaces it after a capture counts `epoch` up."""
        self.static = StaticKV(shape.static) if shape.static else None
        """Layers without pages."""
        self.epoch = 0
        """How often memory that a captured step names was replaced."""
        units = (shape.n_rows, shape.n_kv_heads)
        lead = (shape.n_layers, *units)
        columns = shape.near_tokens + SLACK_COLUMNS
        pinned = shape.device.type == "cuda"
        near = functools.partial(torch.zeros, dtype=shape.dtype, device=shape.device)
        # Not in inference mode: in-place writes from outside of it would be refused.
        with torch.inference_mode(mode=False):
            self.near_keys = near((*lead, columns, shape.key_dim))
            self.near_values = near((*lead, columns, shape.value_dim))
            self.table = torch.zeros(shape.n_searches, *units, shape.n_pages, dtype=torch.int64, device=shape.device)
            self.state = torch.zeros(1 + 3 * shape.n_rows, dtype=torch.int32, device=shape.device)
            self._host_state = torch.zeros_like(self.state, device="cpu", pin_memory=pinned)
        self._addresses = [keys.data_ptr() for keys in self.near_keys]
        self.ticket, self.bounds = self.state[:1], self.state[1:].view(shape.n_rows, 3)
        self.lse: list[torch.Tensor | None] = [None] * shape.n_layers
        """Log-sum-exp (B, H, G) over what each layer attended to in the last step; the memory is the graph's."""
        self.near_counts: list[int] = [0] * shape.n_rows
        """Near tokens of each row that the step in flight attends to, the newest included."""
        self._held: list[weakref.ref[NearBuffer] | None] = [None] * shape.n_layers
        self.scaling: list[float | None] = [None] * shape.n_layers
        """Factor of the logits of each layer, known once it has attended."""
        self.softcap: list[float | None] = [None] * shape.n_layers

    def nbytes(self) -> int:
        """Bytes on the device."""
        own = sum(t.nbytes for t in (self.near_keys, self.near_values, self.table, self.state))
        return own + sum(0 if part is None else part.nbytes() for part in (self.finder, self.static))

    def hold(self, near: Sequence[NearBuffer]) -> None:
        """Move the near tokens of every layer into the static buffers; those that are there already stay.

        Whoever was there before gets memory of its own.
        """
        for layer, buffer in enumerate(near):
            if self.holds(layer, buffer):
                continue
            before = self._held[layer]
            held = None if before is None else before()
            if held is not None and self.holds(layer, held):
                held.own(held.stop)
            buffer.move_to(self.near_keys[layer], self.near_values[layer])
            self._held[layer] = weakref.ref(buffer)

    def release(self) -> None:
        """Give every near buffer that lives here memory of its own."""
        for layer, before in enumerate(self._held):
            held = None if before is None else before()
            if held is not None and self.holds(layer, held):
                held.own(held.stop)
        self._held = [None] * self.shape.n_layers
        if self.static is not None:
            self.static.release()

    def holds(self, layer: int, near: NearBuffer) -> bool:
        """Whether `near` lives in the buffers of `layer`."""
        return bool(near.keys.data_ptr() == self._addresses[layer])

    def write_state(self, ticket: int, near: NearBuffer) -> None:
        """Say which step this is and which columns are live, the newest token's included.

        Asynchronous on the current stream; the step before must be over, because its copy may still be under way.
        """
        self.near_counts = [near.count(b) + 1 for b in range(near.n_rows)]
        values = [ticket]
        for sink, start in zip(near.sinks, near.starts, strict=True):
            values += (sink, start, near.stop + 1)
        self._host_state.numpy()[:] = values
        self.state.copy_(self._host_state, non_blocking=True)

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        scaling: float,
        softcap: float | None,
    ) -> torch.Tensor:
        """Put the newest token into the window and attend with its query.

        A layer that shares pages reads those that its leader was told in this step.

        Parameters
        ----------
        query : torch.Tensor
            (B, H * G, 1, D), post-RoPE.
        keys, values : torch.Tensor
            (B, H, 1, D) and (B, H, 1, Dv).

        Returns
        -------
        torch.Tensor
            (B, 1, H * G, Dv) in the query's dtype. Asynchronous.
        """
        from icecache.kernels.mailbox import mailbox_post, mailbox_wait  # triton: only where there is a device
        from icecache.kernels.paged_decode import paged_decode
        from icecache.kernels.window_append import window_append

        shape, box = self.shape, self.mailbox
        self.scaling[layer], self.softcap[layer] = scaling, softcap
        grouped = query.reshape(shape.n_rows, shape.n_kv_heads, shape.group, shape.key_dim).contiguous()
        group, place = shape.place_of(layer)
        near_keys, near_values, table = self.near_keys[layer], self.near_values[layer], self.table[group]
        if box is not None and place == 0:  # first of all: what follows runs while the host searches
            mailbox_post(grouped, box.queries[group, : shape.n_rows], box.request[group : group + 1], self.ticket)
        window_append(keys, values, near_keys, near_values, self.bounds)
        if box is not None and place == 0:
            answered, timeout = box.answered[group : group + 1], box.timeout[group : group + 1]
            mailbox_wait(answered, box.table[group, : shape.n_rows], timeout, self.ticket, table)
        elif self.finder is not None and place == 0:
            self.finder.find(group, grouped, table, scaling, softcap)
        out, self.lse[layer] = paged_decode(
            grouped,
            near_keys,
            near_values,
            self.bounds,
            table,
            scaling,
            softcap=softcap,
            page_strides=shape.page_strides(layer),
            unread=None if self.finder is None else self.finder.unread(group),
        )
        return out.reshape(shape.n_rows, 1, -1, shape.value_dim)
