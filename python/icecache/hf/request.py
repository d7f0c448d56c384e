"""Which forward calls are decode steps that a captured graph can serve."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache

from icecache.hf.cache import RetrievalLayer
from icecache.hf.masks import new_tokens
from icecache.hf.names import CACHE_NAMES
from icecache.hf.static import StaticLayer, static_layer
from icecache.hf.step import Step
from icecache.pages import LayerPages

STATIC = ("input_ids", "position_ids", "cache_position")
"""Tensors that every step is given anew; a graph reads them from static buffers."""
_SKIPPED = ("attention_mask", *CACHE_NAMES)
"""A decode step of ours needs no mask: padding is never stored."""
_WANTS_MORE = ("output_attentions", "output_hidden_states")


class NotCapturableError(Exception):
    """The decode steps of this model cannot be captured; the message says why."""


@dataclass(frozen=True, slots=True)
class Request:
    """A call that a graph can serve.

    Parameters
    ----------
    layers, pages
        Of every layer of the cache that has pages.
    static : list of StaticLayer
        The other layers.
    pads : list of int
        Per row, positions of padding before its first token.
    inputs : dict
        Tensors of `STATIC` that were given.
    options : tuple
        Sorted pairs of all other arguments: numbers, truth values and names.
    group : int
        Query heads per KV head.
    """

    cache: Cache
    layers: list[RetrievalLayer]
    pages: list[LayerPages]
    inputs: dict[str, torch.Tensor]
    options: tuple[tuple[str, object], ...]
    group: int
    static: list[StaticLayer]
    pads: list[int]

    @property
    def kind(self) -> object:
        """What a graph is captured for."""
        shapes = tuple((name, tuple(x.shape), x.dtype, x.device) for name, x in self.inputs.items())
        return shapes, self.options

    @property
    def length(self) -> int:
        """Positions before this step."""
        return self.layers[0].get_seq_length()


def read_request(step: Step, arguments: Mapping[str, object]) -> Request | None:
    """Turn the arguments of a forward into a request; None: this call is not one, though others may be.

    Raises
    ------
    NotCapturableError
        If no decode step of this model can be one.
    CacheStateError
        If the mask contradicts earlier masks, or only some layers that share pages were cropped, as in an eager step.
    """
    cache = next((x for name in CACHE_NAMES if isinstance(x := arguments.get(name), Cache)), None)
    ids = arguments.get("input_ids")
    if cache is None or not isinstance(ids, torch.Tensor) or ids.dim() != 2 or ids.shape[1] != 1:
        return None
    if torch.is_grad_enabled() or arguments.get("return_dict") is False:
        return None
    rest = {k: v for k, v in arguments.items() if v is not None and k not in (*STATIC, *_SKIPPED)}
    if any(not isinstance(v, (bool, int, str)) for v in rest.values()) or any(rest.get(k) for k in _WANTS_MORE):
        return None
    layers = [layer for layer in cache.layers if isinstance(layer, RetrievalLayer)]
    if not layers:
        return None
    pages = [layer.pages for layer in layers if layer.pages is not None]
    group = layers[0].group
    if len(pages) < len(layers) or group is None or not _uniform(pages):
        return None
    static = _static_layers(cache, layers[0].get_seq_length())
    pads = pages[0].padding.leading() if static else []
    if static is None or pads is None or any(x.layer.keys.device != pages[0].near.keys.device for x in static):
        return None
    mask = arguments.get("attention_mask")
    if mask is not None and not _all_new(step, layers[0], mask):
        return None
    inputs = {name: x for name in STATIC if isinstance(x := arguments.get(name), torch.Tensor)}
    return Request(cache, layers, pages, inputs, tuple(sorted(rest.items())), group, static, pads)


def _static_layers(cache: Cache, length: int) -> list[StaticLayer] | None:
    """Layers that keep everything on the device, or a window; None: one of them is not ready."""
    found = []
    for number, layer in enumerate(cache.layers):
        if isinstance(layer, RetrievalLayer):
            continue
        static = static_layer(number, layer, length)
        if isinstance(static, str):
            raise NotCapturableError(static)
        if static is None:
            return None
        found.append(static)
    return found


def _uniform(pages: list[LayerPages]) -> bool:
    """Whether all layers hold the same tokens near, in shapes that one buffer can have, and new ones just go behind."""
    first = pages[0].near
    shape = (first.keys.shape[:2], first.keys.shape[3], first.values.shape[3], first.keys.dtype, first.keys.device)
    leader = pages[0]
    for p in pages:
        leader, near = (p if p.place == 0 else leader), p.near
        if p.shelf is not leader.shelf:  # only some of its layers were reordered: the eager step says so
            return False
        p.shelf.check_even()
        if not p.forests or (near.sinks, near.starts, near.stop) != (first.sinks, first.starts, first.stop):
            return False
        if (near.keys.shape[:2], near.keys.shape[3], near.values.shape[3], near.keys.dtype, near.keys.device) != shape:
            return False
    return first.can_append()


def _all_new(step: Step, layer: RetrievalLayer, mask: object) -> bool:
    """Whether the new position of every row is a token."""
    return isinstance(mask, torch.Tensor) and mask.dim() == 2 and new_tokens(step, layer, mask) is None
