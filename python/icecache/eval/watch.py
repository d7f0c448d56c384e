"""Watches the layers of a running policy: each decode step's query, all keys and values, and what was attended."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from icecache import _core
from icecache.config import PAGE_TOKENS
from icecache.errors import UnsupportedModelError
from icecache.eval.heads import MEASURES, HeadStep, measure
from icecache.hf.cache import RetrievalLayer
from icecache.hf.call import Call
from icecache.runtime import IceRuntime
from icecache.stats import TraceEvent

if TYPE_CHECKING:
    from transformers import Cache

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class LayerStep:
    """Measures of a layer in one step.

    Parameters
    ----------
    layer : int
        Which.
    heads : torch.Tensor
        float64 `(H, len(MEASURES))`, see `measure`; on the model's device, so that no step waits for it.
    calibration : float
        |estimated - true| captured mass, both means over the layer's query heads; NaN where the policy estimates none.
    """

    layer: int
    heads: Tensor
    calibration: float


class Watch:
    """Measures every decode step of a cache's retrieval layers; one row, eager steps.

    Parameters
    ----------
    runtime : IceRuntime
        Its trace is taken, its counters are reset at every layer.
    cache : Cache
        Of the runtime, holding the prefill.
    prefilled : Cache
        The dense prefill that it came from.
    add : callable
        Takes a `LayerStep` for each layer and step.
    """

    def __init__(self, runtime: IceRuntime, cache: Cache, prefilled: Cache, add: Callable[[LayerStep], None]) -> None:
        self._runtime, self._add = runtime, add
        self._event: TraceEvent | None = None
        self._kept: dict[int, Pair] = {}
        self._pages: dict[int, tuple[int, Tensor]] = {}
        runtime.trace = self._note
        for layer, source in zip(cache.layers, prefilled.layers, strict=True):
            if isinstance(layer, RetrievalLayer):
                pair = source.dense_pair() if isinstance(source, RetrievalLayer) else (source.keys, source.values)
                assert pair is not None
                self._kept[layer.layer_idx] = pair
                # On the instance: a runtime's other caches stay as they are.
                setattr(layer, "attend", self._watched(layer, layer.attend))  # noqa: B010

    def _note(self, event: TraceEvent) -> None:
        self._event = event

    def _watched(self, layer: RetrievalLayer, attend: Callable[[Call], Tensor]) -> Callable[[Call], Tensor]:
        def attend_and_measure(call: Call) -> Tensor:
            if call.sinks is not None or call.shared:
                msg = "attention sinks and layers that share keys cannot be measured"
                raise UnsupportedModelError(msg)
            self._event = None
            self._runtime.reset_stats()
            out = attend(call)
            old, n_new = self._kept[layer.layer_idx], call.query.shape[2]
            new = call.keys[:, :, -n_new:], call.values[:, :, -n_new:]
            keys, values = torch.cat([old[0], new[0]], 2), torch.cat([old[1], new[1]], 2)
            self._kept[layer.layer_idx] = keys, values
            event = self._event or near_only(layer, call.keys.shape[1])
            # Neither: the layer is dense.
            if event is not None and n_new == 1:
                self._measure(layer, call, out, event)
            return out

        return attend_and_measure

    def _measure(self, layer: RetrievalLayer, call: Call, out: Tensor, event: TraceEvent) -> None:
        keys, values = self._kept[layer.layer_idx]
        n_heads, group = keys.shape[1], call.query.shape[1] // keys.shape[1]
        step = HeadStep(
            query=call.query[0, :, 0].reshape(n_heads, group, -1),
            keys=keys[0],
            values=values[0],
            out=out[0, 0].reshape(n_heads, group, -1),
            attended=attended_tokens(event, n_heads, keys.shape[2], group).to(keys.device),
            page=self._page_of(layer, keys.shape[2], keys.device),
            scaling=call.scaling,
            softcap=call.softcap,
        )
        heads = measure(step)
        estimate, calibration = self._runtime.stats().mass_kept, math.nan
        if not math.isnan(estimate):
            calibration = abs(estimate - float(heads[:, MEASURES.index("mass")].mean()))
        self._add(LayerStep(layer.layer_idx, heads, calibration))

    def _page_of(self, layer: RetrievalLayer, n_tokens: int, device: torch.device) -> Tensor | None:
        """`pages_of_tokens`, listed again only when tokens have entered the index."""
        if layer.pages is None or not layer.pages.forests:
            return None
        changes, page = self._pages.get(layer.layer_idx, (-1, None))
        if page is None or changes != layer.pages.changes:
            page = pages_of_tokens(layer, n_tokens, device)
            assert page is not None
        page = torch.nn.functional.pad(page, (0, n_tokens - page.shape[1]), value=-1)
        self._pages[layer.layer_idx] = layer.pages.changes, page
        return page


def near_only(layer: RetrievalLayer, n_heads: int) -> TraceEvent | None:
    """Event of a layer that read nothing but sink and window ("streaming" reads no pages); None: it has no pages."""
    pages = layer.pages
    if pages is None:
        return None
    length = pages.length(0)
    return TraceEvent(
        layer=layer.layer_idx,
        rows=(0,),
        lengths=(length,),
        sink_tokens=(pages.near.sinks[0],),
        window_start=(length - pages.near.window_count(0),),
        pages=np.zeros((1, n_heads, 0), np.int64),
        positions=np.zeros((1, n_heads, 0, PAGE_TOKENS), np.int32),
    )


def attended_tokens(event: TraceEvent, n_heads: int, n_tokens: int, group: int) -> Tensor:
    """Which tokens an event of one row says were attended.

    Returns
    -------
    torch.Tensor
        bool `(H, G, n)`.
    """
    if event.attended is not None:
        return torch.from_numpy(event.attended[0, :, :, :n_tokens].copy())
    mask = torch.zeros(n_heads, n_tokens, dtype=torch.bool)
    mask[:, : event.sink_tokens[0]] = True
    mask[:, event.window_start[0] :] = True
    for h in range(n_heads):
        positions = event.positions[0, h]
        mask[h, torch.from_numpy(positions[positions >= 0].astype("int64"))] = True
    return mask[:, None].expand(-1, group, -1)


def pages_of_tokens(layer: RetrievalLayer, n_tokens: int, device: torch.device) -> Tensor | None:
    """Page of each token in the layer's index, int64 `(H, n)`, -1 outside of pages; None: it has no pages."""
    if layer.pages is None or not layer.pages.forests:
        return None
    first = layer.pages.near.sinks[0]
    positions = torch.from_numpy(_core.all_pages(layer.pages.forests).positions()[0].astype("int64"))  # (H, P, 16)
    # Column n takes what is no token.
    page = torch.full((positions.shape[0], n_tokens + 1), -1, dtype=torch.int64)
    numbers = torch.arange(positions.shape[1]).repeat_interleave(PAGE_TOKENS).expand(positions.shape[0], -1)
    at = torch.where(positions >= 0, positions + first, n_tokens)
    return page.scatter(1, at.flatten(1), numbers)[:, :-1].to(device)
