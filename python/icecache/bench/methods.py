"""The ways to decode that are compared, each as one object that decodes a token a call."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from transformers import DynamicCache

from icecache.bench.baselines import StaticGraph
from icecache.bench.filled import Filled
from icecache.bench.fixed import FixedPages
from icecache.bench.synthetic import Content, fill
from icecache.config import IceConfig
from icecache.errors import ConfigError
from icecache.hf.graph import GraphDecoder
from icecache.hf.names import cache_argument
from icecache.runtime import IceRuntime

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.cache_utils import Cache

METHODS = {
    "ice": "IceCache: search on the device, a step in one CUDA graph",
    "ice-1bit": "the same with one bit an element of the summaries on the device, as for long contexts",
    "ice-2bit": "the same with both bits there, as for short ones",
    "ice-unread": "the same as ice, with an estimate of the pages that are not read",
    "ice-cpu": "IceCache: search on the host, a step in one CUDA graph",
    "ice-6": "the same with 6 candidates per page read, at least 112, instead of 16 and 192",
    "ice-reuse": "the same as ice, and of 3 layers one searches for all",
    "ice-paper": "the paper's setting: 2 layers dense, and of 3 others one searches for all",
    "ice-eager": "IceCache, op by op",
    "ice-no-search": "IceCache with a fixed page choice, a step in one CUDA graph",
    "hf": "Hugging Face, sdpa, DynamicCache",
    "hf-offload": "Hugging Face, sdpa, offloaded DynamicCache",
    "flash-graph": "full attention, flash-decoding kernel, static cache, a step in one CUDA graph",
}


_CONFIGS = {
    "ice": IceConfig(search="gpu"),
    "ice-1bit": IceConfig(search="gpu", search_bits=1),
    "ice-2bit": IceConfig(search="gpu", search_bits=2),
    "ice-unread": IceConfig(search="gpu", estimate_unread=True),
    "ice-cpu": IceConfig(search="cpu"),
    "ice-6": IceConfig(search="cpu", candidates_per_page=6),
    "ice-reuse": IceConfig(search="gpu", reuse=3),
    "ice-paper": IceConfig(search="gpu", reuse=3, dense_layers=(0, 1)),
}

WARM_UP_TOKENS = 2048
"""Of a prompt, before its time is taken: enough for pages to be built and a step to be captured."""
CHUNK_TOKENS = 1 << 17
"""Longest piece of a prompt computed at once: activations of more do not fit beside an 8B model."""


class Decoding:
    """A sequence that is being decoded greedily by one method.

    Parameters
    ----------
    step : callable
        Decode one token; ids (B, 1), asynchronously.
    fill : callable
        Compute the prompt, or write the made-up keys and values; before the first step. Says whether pages of an
        earlier cell were taken over instead.
    warm_up : callable
        Do all of it once with a short prompt, so that what is done at first use only is done.
    close : callable
        Free everything and restore the model.
    runtime : IceRuntime or None
        Ours.
    """

    def __init__(
        self,
        step: Callable[[], torch.Tensor],
        fill: Callable[[], bool],
        warm_up: Callable[[], None],
        close: Callable[[], object],
        runtime: IceRuntime | None = None,
    ) -> None:
        self.step, self.fill, self.warm_up, self.close, self.runtime = step, fill, warm_up, close, runtime


def start(
    method: str,
    model: PreTrainedModel,
    content: Content,
    *,
    budget: int,
    n_new: int,
    prompt: torch.Tensor | None,
    filled: Filled | None = None,
) -> Decoding:
    """Make a method ready to be filled and to decode `n_new` tokens then.

    Parameters
    ----------
    prompt : torch.Tensor or None
        Ids (B, n) to compute; None: the cache is filled with made-up keys and values.
    filled : Filled or None
        Where cells that differ in budget share such pages; None: nowhere.

    Raises
    ------
    ConfigError
        If there is no such method.
    """
    if method == "flash-graph" and prompt is not None:
        msg = "method flash-graph knows no prompt, only made-up keys and values"
        raise ConfigError(msg)
    if method in ("flash-graph", "ice-no-search", "hf-offload") and content.device.type != "cuda":
        msg = f"method {method} needs a CUDA device, got {content.device}"
        raise ConfigError(msg)
    if method == "flash-graph":
        static = StaticGraph(model, content, n_new)
        return Decoding(static.step, lambda: False, _nothing, static.close)
    if method in ("hf", "hf-offload"):
        # cuDNN's attention plans each new length anew, 2 ms a layer on an H100 with torch 2.11: off for their own good.
        cudnn = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
        torch.backends.cuda.enable_cudnn_sdp(False)
        offloads = method == "hf-offload"
        new_cache = lambda: DynamicCache(config=model.config, offloading=offloads)  # noqa: E731

        def fill_plain(cache: Cache) -> bool:
            fill(cache, content)
            return False

        return _decoding(
            model, new_cache, content, prompt, fill_plain, lambda: torch.backends.cuda.enable_cudnn_sdp(cudnn)
        )
    if method not in METHODS:
        msg = f"method must be one of {', '.join(METHODS)}, got {method!r}"
        raise ConfigError(msg)
    config = replace(_CONFIGS.get(method, IceConfig(decode="eager")), budget=budget)
    runtime = IceRuntime.wrap(model, config)
    if method == "ice-no-search":
        runtime._hooks.decode_with(GraphDecoder(model, runtime._engine, FixedPages(content.seed)))
    kept = filled or Filled()
    fill_pages = lambda cache: kept.fill(runtime, cache, content)  # noqa: E731
    return _decoding(model, runtime.new_cache, content, prompt, fill_pages, runtime.unwrap, runtime)


def _nothing() -> None:
    """Leave a method alone that `start` makes whole."""


def _decoding(
    model: PreTrainedModel,
    new_cache: Callable[[], Cache],
    content: Content,
    prompt: torch.Tensor | None,
    fill_made_up: Callable[[Cache], bool],
    close: Callable[[], object],
    runtime: IceRuntime | None = None,
) -> Decoding:
    """Decode greedily with a cache of Hugging Face's interface."""
    cache = new_cache()

    def warm_up() -> None:
        if prompt is not None:
            short = new_cache()
            _compute(model, short, prompt[:, :WARM_UP_TOKENS])
            step = _greedy(model, short, content)
            step(), step()

    def fill_all() -> bool:
        if prompt is None:
            return fill_made_up(cache)
        _compute(model, cache, prompt)
        return False

    return Decoding(_greedy(model, cache, content), fill_all, warm_up, close, runtime)


def _compute(model: PreTrainedModel, cache: Cache, prompt: torch.Tensor) -> None:
    for first in range(0, prompt.shape[1], CHUNK_TOKENS):
        chunk = prompt[:, first : first + CHUNK_TOKENS]
        model(chunk, **cache_argument(cache), use_cache=True, logits_to_keep=1)


def _greedy(model: PreTrainedModel, cache: Cache, content: Content) -> Callable[[], torch.Tensor]:
    ids = torch.zeros(content.n_rows, 1, dtype=torch.long, device=content.device)

    def step() -> torch.Tensor:
        nonlocal ids
        logits: torch.Tensor = model(ids, **cache_argument(cache), use_cache=True).logits
        ids = logits[:, -1:].argmax(-1)
        return ids

    return step
