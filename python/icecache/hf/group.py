"""Layers of one cache that share pages: their prompts become pages together, when the last of them has its keys."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from icecache.config import PAGE_TOKENS
from icecache.errors import UnsupportedModelError
from icecache.pages import build, send_chunk
from icecache.pages.shelf import Pair, row_dim

if TYPE_CHECKING:
    from icecache.hf.cache import RetrievalLayer


LONG_CHUNK_TOKENS = 512
"""Chunks from here on leave the device layer by layer; shorter ones wait in the window for the end of the step."""
_AHEAD_PAGES = 32
"""Of a tree, for what is decoded: an insert of 16 tokens leases 26, most of which it gives back."""


def members(layer: RetrievalLayer) -> list[RetrievalLayer]:
    """Live layers of the group of `layer`, in order; it is one of them."""
    known = layer.sequence.layers
    found = [known[i]() for i in layer.members if i in known]
    return [x for x in found if x is not None]


def page_in(layer: RetrievalLayer, valid: torch.Tensor | None) -> None:
    """Move all tokens of the group of `layer` to pages, if every layer of it has attended to its prompt.

    Parameters
    ----------
    valid : torch.Tensor or None
        Bool (n_rows, n_positions) on the CPU; False: padding. None: no padding.

    Raises
    ------
    UnsupportedModelError
        If keys or values of the group differ in shape, dtype or device.
    BadTensorError, PoolExhaustedError
        As for :func:`icecache.pages.build`.
    """
    group = members(layer)
    pairs = [pair for x in group if (pair := x.waiting(layer.get_length())) is not None]
    if len(pairs) < len(layer.members):
        return
    _check_alike(group, pairs)
    services = layer.engine.services
    reserve(layer, *pairs[0])
    offload = services.offload_from(pairs[0][0].device)
    built = build(
        layer.engine.layout,
        layer.members,
        services.stores,
        services.pool,
        services.recorder,
        pairs,
        valid,
        offload,
    )
    for x, pages in zip(group, built, strict=True):
        x.take_pages(pages)


def send(layer: RetrievalLayer, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor | None) -> bool:
    """Let a later chunk leave the device now, while the next layers are computed; its layer has attended.

    The last of the layers that share pages sends for all of them.

    Returns
    -------
    bool
        False, and nothing was done, if the chunk is short, stays, or other layers still need it.
    """
    group, services = members(layer), layer.engine.services
    offload, pages = services.offload_from(keys.device), [x.pages for x in group if x.pages is not None]
    if offload is None or len(pages) < len(layer.members) or not pages[0].forests or keys.shape[2] < LONG_CHUNK_TOKENS:
        return False
    if any(x.may_be_shared for x in group) or layer is not group[-1]:
        return False
    earlier = [x.deferred for x in group[:-1]]
    chunks = [pair for pair in earlier if pair is not None and pair[0].shape == keys.shape]
    if len(chunks) < len(earlier):
        return False
    reserve(group[0], keys, values)
    send_chunk(pages, [*chunks, (keys, values)], valid, offload, services.recorder)
    for x in group:
        x.note_sent()
    return True


def reserve(layer: RetrievalLayer, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Make ready for a prompt in all layers, if this is the first one: memory, also for inserts behind it, and kernels.

    Parameters
    ----------
    keys, values : torch.Tensor
        (B, H, n, D) and (B, H, n, Dv): what is about to be stored for this layer.
    """
    layout, stores, known = layer.engine.layout, layer.engine.services.stores, layer.sequence.layers
    if not layout.keeps_middle or layer.members[0] != min(known):
        return
    if layer.engine.expect is not None:
        layer.engine.expect(layer, keys, values)
    n_rows, n_heads, n_positions, key_dim = keys.shape
    store = stores.get(key_dim, row_dim(key_dim, values.shape[-1], len(layer.members)), keys.dtype, keys.device)
    middle = max(n_positions - layout.sink_tokens - layout.window_tokens, 0)
    n_trees = n_rows * n_heads * -(-len(known) // len(layer.members))
    stores.start_reserving(store, n_trees * (middle // PAGE_TOKENS + _AHEAD_PAGES) * store.page_bytes)


def _check_alike(group: list[RetrievalLayer], pairs: list[Pair]) -> None:
    described = [[(tuple(t.shape), t.dtype, t.device) for t in pair] for pair in pairs]
    for layer, kind in zip(group, described, strict=True):
        if kind != described[0]:
            msg = (
                f"layer {layer.layer_idx}: its keys and values ({_text(kind)}) differ from those of layer "
                f"{group[0].layer_idx} ({_text(described[0])}), whose pages it would share; set reuse=1"
            )
            raise UnsupportedModelError(msg)


def _text(kind: list[tuple[tuple[int, ...], torch.dtype, torch.device]]) -> str:
    return ", ".join(f"{shape} {dtype} on {device}" for shape, dtype, device in kind)


def leave(layer: RetrievalLayer) -> None:
    """Take `layer` out of its group, because it stays dense: the others go on without it."""
    rest = tuple(i for i in layer.members if i != layer.layer_idx)
    others = [x for x in members(layer) if x is not layer]
    layer.members = (layer.layer_idx,)
    for x in others:
        x.members = rest
    if others and others[0].waiting(others[0].get_length()) is not None:
        page_in(others[0], others[0].valid)
