"""Turn a filled cache into one of ours: from a dense prefill, or from another runtime's pages."""

from __future__ import annotations

import copy

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from icecache.errors import CacheStateError
from icecache.hf.cache import RetrievalLayer
from icecache.hf.hooks import ModelHooks
from icecache.hf.policy import PolicyLayer
from icecache.hf.step import Sequence


def adopt(hooks: ModelHooks, cache: Cache, attention_mask: torch.Tensor | None) -> DynamicCache:
    """Make a cache of ours with the content of `cache`, which stays usable.

    Parameters
    ----------
    cache : Cache
        A filled ``DynamicCache`` of the same model, or a cache of another runtime on it.
    attention_mask : torch.Tensor or None
        (n_rows, n_positions); 0 marks padding. For a plain cache, or one of ours that is still short (dense): pages
        know theirs.

    Raises
    ------
    CacheStateError
        If the layers do not fit the model, or pages of another sink or a narrower window would have to be re-cut.
    """
    result = hooks.new_cache()
    if len(cache.layers) != len(result.layers):
        msg = f"the cache has {len(cache.layers)} layers, the model {len(result.layers)}"
        raise CacheStateError(msg)
    sequence = Sequence()
    for i, (source, target) in enumerate(zip(cache.layers, result.layers, strict=True)):
        result.layers[i] = _adopted(hooks, source, target, sequence, attention_mask, i)
    return result


def _adopted(
    hooks: ModelHooks,
    source: CacheLayerMixin,
    target: CacheLayerMixin,
    sequence: Sequence,
    attention_mask: torch.Tensor | None,
    layer: int,
) -> CacheLayerMixin:
    if isinstance(source, RetrievalLayer):
        source.sequence.settle()
        source.sequence.check()
        if source.kept is None:
            return _from_short(hooks, source, target, sequence, attention_mask)
        if not isinstance(target, RetrievalLayer):
            msg = f"layer {layer}: the cache holds pages, but this runtime keeps the layer dense"
            raise CacheStateError(msg)
        return _rehomed(hooks, source, target, sequence)
    if not isinstance(target, RetrievalLayer):
        if type(source) is not type(target):
            msg = f"layer {layer}: the cache holds a {type(source).__name__}, the model needs {type(target).__name__}"
            raise CacheStateError(msg)
        return copy.deepcopy(source)
    if type(source) is not DynamicLayer:
        msg = f"layer {layer}: only a plain DynamicLayer can be taken over, got {type(source).__name__}"
        raise CacheStateError(msg)
    new = hooks.new_layer(sequence, layer)
    if source.get_seq_length() == 0:
        return new
    keys, values = source.keys, source.values
    new.load(keys, values, _valid_positions(attention_mask, keys.shape[0], keys.shape[2]))
    return new


def _valid_positions(attention_mask: torch.Tensor | None, n_rows: int, n_positions: int) -> torch.Tensor | None:
    """Bool (n_rows, n_positions) on the CPU; None: no padding."""
    if attention_mask is None:
        return None
    if tuple(attention_mask.shape) != (n_rows, n_positions):
        msg = (
            f"attention_mask must have shape {(n_rows, n_positions)} like the cache, got {tuple(attention_mask.shape)}"
        )
        raise CacheStateError(msg)
    valid = attention_mask.bool().cpu()
    return None if bool(valid.all()) else valid


def _rehomed(hooks: ModelHooks, source: RetrievalLayer, target: RetrievalLayer, sequence: Sequence) -> RetrievalLayer:
    layer = target.layer_idx
    if hooks.engine.masks != source.engine.masks:
        msg = f"layer {layer}: it was prepared for another policy; adopt a dense cache instead (policies.Prefill)"
        raise CacheStateError(msg)
    ours, theirs = hooks.engine.layout, source.engine.layout
    if source.pages is not None and not ours.continues(theirs):
        msg = (
            f"layer {layer}: its pages were cut for sink {theirs.sink_tokens} and window {theirs.window_tokens}, this "
            f"runtime has sink {ours.sink_tokens} and window {ours.window_tokens}, where the sink must be the same and "
            "the window no wider; adopt a dense cache instead"
        )
        raise CacheStateError(msg)
    if source.pages is not None and source.members != target.members:
        msg = (
            f"layer {layer}: its pages are shared by layers {source.members}, this runtime shares those of layers "
            f"{target.members}; wrap with the same reuse and dense_layers, or adopt a dense cache instead"
        )
        raise CacheStateError(msg)
    stores = hooks.engine.services.stores
    if source.pages is not None and stores.value_means and not source.pages.store.value_means:
        msg = (
            f"layer {layer}: its pages have no mean values, which estimate_unread=True needs; wrap the other runtime "
            "with it, or adopt a dense cache instead"
        )
        raise CacheStateError(msg)
    stores.share(source.engine.services.stores)
    new = source.forked(hooks.engine, sequence)
    if new.pages is not None:
        new.pages.layout = ours
    return new


def _from_short(
    hooks: ModelHooks,
    source: RetrievalLayer,
    target: CacheLayerMixin,
    sequence: Sequence,
    attention_mask: torch.Tensor | None,
) -> CacheLayerMixin:
    """Take over a layer that is still dense, with the notes it took."""
    pair = source.dense_pair()
    if not isinstance(target, RetrievalLayer):
        if pair is not None:
            target.update(*pair)
        return target
    if pair is None:
        return hooks.new_layer(sequence, source.layer_idx)
    keys, values = (tensor.clone() for tensor in pair)
    new = hooks.new_layer(sequence, source.layer_idx)
    valid = _valid_positions(attention_mask, keys.shape[0], keys.shape[2])
    if isinstance(new, PolicyLayer):
        new.load(keys, values, valid, source.notes if isinstance(source, PolicyLayer) else None)
    else:
        new.load(keys, values, valid)
    return new
