"""The two hooks on a wrapped model: one opens a step and supplies the cache layers, one closes it and checks it."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, cast

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer, DynamicSlidingWindowLayer

from icecache.config import PAGE_TOKENS
from icecache.errors import CacheStateError, PoolExhaustedError, UnsupportedModelError
from icecache.hf.attention import IMPLEMENTATION, forget_own, remember_own
from icecache.hf.cache import RetrievalLayer
from icecache.hf.graph import GraphDecoder
from icecache.hf.group import leave
from icecache.hf.names import CACHE_NAMES, stray_cache
from icecache.hf.policy import PolicyLayer
from icecache.hf.step import Engine, Sequence, Step, current_step, set_current_step
from icecache.hf.support import layer_groups, layer_plan, set_implementation, text_config_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_LONG_WINDOW_TOKENS = 64
"""A window this much longer than it should be is drained at the end of its step, not at the next: its memory counts.
Shorter ones wait, so that a rejected draft is cropped from the window and never touches the index."""

_LONG_PROMPT_TOKENS = 8192
"""A chunk that is long enough to keep a large device busy, and short enough for its memory."""


class ModelHooks:
    """Everything that is changed on a model, and its undoing.

    Parameters
    ----------
    model : PreTrainedModel
        A decoder that dispatches attention through ``AttentionInterface``.
    engine : Engine
        Shared with the layers of every cache made here.

    Raises
    ------
    UnsupportedModelError, ConfigError
        The model is left untouched then.
    """

    def __init__(self, model: PreTrainedModel, engine: Engine) -> None:
        self.model, self.engine = model, engine
        self.text_config = text_config_of(model)
        self.dense_layers = set(engine.config.dense_layers)
        self.plan = layer_plan(model, frozenset(self.dense_layers))
        engine.n_layers = len(self.plan)
        self._groups = {i: group for group in layer_groups(self.plan, engine.config.reuse) for i in group}
        self._names = [name for name in inspect.signature(type(model).forward).parameters if name != "self"]
        self._own = self.text_config._attn_implementation
        if self._own == IMPLEMENTATION:
            msg = "the model, or another one that shares its config, is wrapped already; unwrap that one first"
            raise CacheStateError(msg)
        remember_own(self.text_config, self._own)
        try:
            set_implementation(model, IMPLEMENTATION)
            if self.text_config._attn_implementation != IMPLEMENTATION:
                msg = f"{type(model).__name__}: the attention implementation could not be set"
                raise UnsupportedModelError(msg)
        except BaseException:
            set_implementation(model, self._own)
            forget_own(self.text_config)
            raise
        self.decoder: GraphDecoder | None = None
        self._handles = [
            model.register_forward_pre_hook(self._open, with_kwargs=True),
            model.register_forward_hook(self._close, with_kwargs=True, always_call=True),
        ]

    def decode_with(self, decoder: GraphDecoder) -> None:
        """Let `decoder` serve the decode steps it can serve, instead of the one before."""
        if self.decoder is not None:
            self.decoder.remove()
        decoder.install(self._names)
        self.decoder = decoder

    def remove(self) -> None:
        """Give the model back exactly as it was."""
        if self.decoder is not None:
            self.decoder.remove()
        for handle in self._handles:
            handle.remove()
        set_implementation(self.model, self._own)
        forget_own(self.text_config)

    def groups(self) -> list[tuple[int, ...]]:
        """Give the retrieval layers that share pages, leaders first; a layer that stays dense has left its group."""
        return sorted({self._members(i) for i in self._groups} - {()})

    def _members(self, layer: int) -> tuple[int, ...]:
        return tuple(i for i in self._groups.get(layer, (layer,)) if i not in self.dense_layers)

    # ---- caches ---------------------------------------------------------------------------------------------------
    def new_layers(self) -> list[object]:
        """Cache layers of an empty sequence: ours where attention is full, the model's own elsewhere."""
        sequence = Sequence()
        layers = DynamicCache(config=self.text_config).layers
        return [
            self.new_layer(sequence, i) if type(layer) is DynamicLayer and i not in self.dense_layers else layer
            for i, layer in enumerate(layers)
        ]

    def new_layer(self, sequence: Sequence, layer: int) -> RetrievalLayer:
        """Empty cache layer of the kind that the policy needs."""
        kind = RetrievalLayer if self.engine.masks is None else PolicyLayer
        return kind(self.engine, sequence, layer, self._members(layer))

    def new_cache(self) -> DynamicCache:
        """Empty cache."""
        cache = DynamicCache(config=self.text_config)
        cache.layers[:] = self.new_layers()
        return cache

    def _supply_layers(self, cache: Cache) -> None:
        """Swap the layers inside an empty DynamicCache: the object stays the caller's, who sees it filled."""
        if type(cache) is not DynamicCache or any(_is_ours(layer) or _is_filled(layer) for layer in cache.layers):
            return
        recording = any(getattr(layer, "record_past", False) for layer in cache.layers)
        layers = self.new_layers()
        if not cache.layers:
            # Made without a config, so the caller wants no layer to forget: transformers before 5.18 does this for
            # assisted decoding, which has to crop.
            layers = [DynamicLayer() if type(layer) is DynamicSlidingWindowLayer else layer for layer in layers]
        cache.layers[:] = layers
        cache.layer_class_to_replicate = None
        if recording:
            cache.activate_past_recording()

    # ---- a step ---------------------------------------------------------------------------------------------------
    def _argument(self, name: str, args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
        if name in kwargs:
            return kwargs[name]
        position = self._names.index(name) if name in self._names else len(args)
        return args[position] if position < len(args) else None

    def _cache(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> Cache | None:
        found = (self._argument(name, args, kwargs) for name in CACHE_NAMES)
        return next((x for x in found if isinstance(x, Cache)), None)

    def _open(self, _module: torch.nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
        """Pre-hook: everything that can fail before the step changes anything fails here."""
        set_current_step(None)
        if self.decoder is not None:
            self.decoder.settle(account=False)
        names = frozenset(kwargs) | frozenset(self._names[: len(args)])
        step = Step(self.engine, names, sys._getframe(1))
        cache = self._cache(args, kwargs)
        stray = stray_cache({**dict(zip(self._names, args, strict=False)), **kwargs}) if cache is None else None
        if stray is not None:
            msg = f"the cache came as argument {stray!r}, expected {' or '.join(CACHE_NAMES)}; it would stay dense"
            raise UnsupportedModelError(msg)
        if cache is not None:
            self._supply_layers(cache)
            layers = [layer for layer in cache.layers if isinstance(layer, RetrievalLayer)]
            if layers:
                self._prepare(step, cache, layers, args, kwargs)
        set_current_step(step)

    def _prepare(
        self,
        step: Step,
        cache: Cache,
        layers: list[RetrievalLayer],
        args: tuple[object, ...],
        kwargs: Mapping[str, object],
    ) -> None:
        for layer in layers:
            if layer.engine is not self.engine:
                where = "an unwrapped IceRuntime" if layer.engine.closed else "another IceRuntime"
                msg = f"this cache belongs to {where}; start a new cache, or take it over with adopt()"
                raise CacheStateError(msg)
            layer.sequence.settle()
            layer.sequence.check()
        paged = [layer.pages for layer in layers if layer.pages is not None]
        if paged:
            inputs = self._argument("input_ids", args, kwargs)
            if not isinstance(inputs, torch.Tensor):
                inputs = self._argument("inputs_embeds", args, kwargs)
            if isinstance(inputs, torch.Tensor) and inputs.shape[1] > PAGE_TOKENS:
                self._check_memory(layers, inputs.shape[1])
            self.engine.services.drain(paged)
        step.paged = any(layer.kept is not None for layer in layers)
        step.sequence = layers[0].sequence
        step.sequence.shared.clear()
        step.undo = _Undo(self, cache)
        step.sequence.step = step

    def _check_memory(self, layers: list[RetrievalLayer], n_new: int) -> None:
        """Raise before a long chunk whose pages cannot fit."""
        services = self.engine.services
        limit, needed = services.stores.limit_bytes, 0
        if limit is None or not self.engine.layout.keeps_middle:
            return
        for pages in (layer.pages for layer in layers):
            if pages is None or pages.place > 0 or not services.stores.owns(pages.store):
                continue
            for b in range(pages.n_rows):
                leaving = max(pages.near.window_count(b) + n_new - self.engine.layout.window_tokens, 0)
                needed += leaving // PAGE_TOKENS * pages.near.keys.shape[1] * pages.store.page_bytes
        available = max(limit - services.stores.used_bytes(), 0)
        if needed > available:
            msg = (
                f"a chunk of {n_new} tokens needs {needed} bytes of host pages, {available} are available "
                f"(host_memory={limit}); the sequence is unchanged"
            )
            raise PoolExhaustedError(msg, needed_bytes=needed, available_bytes=available)

    def _close(
        self, _module: torch.nn.Module, args: tuple[object, ...], kwargs: Mapping[str, object], output: object
    ) -> None:
        """Forward hook, called after exceptions too: check, commit, or roll back."""
        step = current_step()
        set_current_step(None)
        if step is None:
            return
        cache = self._cache(args, kwargs)
        if step.sequence is None or cache is None:
            step.frame = None
            return
        undo = step.undo
        step.sequence.close()
        assert undo is not None
        if output is None:  # the forward itself raised
            self._advise(sys.exc_info()[1], args, kwargs)
            undo()
            return
        try:
            self._verify(step, cache)
            self._finish(step, cache)
        except BaseException:
            undo()
            raise

    def _advise(self, error: BaseException | None, args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
        """Name the remedy where a prompt is too long for the device."""
        ids = self._argument("input_ids", args, kwargs)
        n_new = ids.shape[1] if isinstance(ids, torch.Tensor) else 0
        if isinstance(error, torch.OutOfMemoryError) and n_new > _LONG_PROMPT_TOKENS:
            msg = (
                f"no room on the device for the activations of {n_new} tokens at once: pass "
                f"prefill_chunk_size={_LONG_PROMPT_TOKENS} to generate, or give the model the prompt in pieces"
            )
            warnings.warn(msg, RuntimeWarning, stacklevel=3)

    def _verify(self, step: Step, cache: Cache) -> None:
        """Every layer that was given keys must have attended with them, or the result is wrong."""
        for i, layer in enumerate(cache.layers):
            if not isinstance(layer, RetrievalLayer):
                continue
            problem = layer.unsupported
            if problem is None and layer.staged is not None:
                problem = (
                    "keys and values given to the cache never reached the attention function unchanged (latent KV, "
                    "or attention outside AttentionInterface)"
                )
            if problem is None:
                continue
            pair = layer.dense_pair()
            if not layer.may_turn_dense() or pair is None:
                msg = f"layer {i}: {problem}"
                raise UnsupportedModelError(msg)
            dense = DynamicLayer()
            dense.update(*pair)  # lossless: so far these are all keys and values there are
            cache.layers[i] = dense
            leave(layer)
            self.dense_layers.add(i)
            self.plan[i] = DynamicLayer.__name__
        if step.n_attention_calls == 0 and any(_is_ours(layer) for layer in cache.layers):
            msg = "no attention module called the registered attention function"
            raise UnsupportedModelError(msg)

    def _finish(self, step: Step, cache: Cache) -> None:
        layers = [layer for layer in cache.layers if isinstance(layer, RetrievalLayer)]
        for layer in layers:
            layer.finish()
        self.engine.services.reader.settle()
        self.engine.services.stores.settle()
        if step.paged:
            self.engine.services.recorder.steps += 1
        limit = self.engine.layout.window_tokens + _LONG_WINDOW_TOKENS
        long = [
            layer.pages
            for layer in layers
            if layer.pages is not None and max(layer.pages.near.window_count(b) for b in range(layer.n_rows)) > limit
        ]
        with suppress(PoolExhaustedError):
            # If it happens, the step is done and correct and its tokens are still in the windows; the next step reports
            # the shortage before it starts.
            self.engine.services.drain(long)


class _Undo:
    """Bring a cache back to the lengths it has now."""

    def __init__(self, hooks: ModelHooks, cache: Cache) -> None:
        self.hooks, self.cache = hooks, cache
        self.lengths = [_length(layer) for layer in cache.layers]

    def __call__(self) -> None:
        self.hooks.engine.services.reader.settle()
        self.hooks.engine.services.stores.settle()
        empty = all(not n for n in self.lengths)
        if empty:
            self.cache.layers[:] = self.hooks.new_layers()
            return
        for i, (layer, length) in enumerate(zip(self.cache.layers, self.lengths, strict=True)):
            if isinstance(layer, RetrievalLayer):
                layer.roll_back(length or 0)
            elif not self._undo_own(layer, length):
                self._break(f"layer {i} ({type(layer).__name__}) cannot be rolled back after a failed step")

    @staticmethod
    def _undo_own(layer: object, length: int | None) -> bool:
        """Roll back a layer of transformers' own; False if it cannot."""
        added = None if length is None else (_length(layer) or 0) - length
        if added and type(layer) is DynamicLayer:
            cast("DynamicLayer", layer).crop(-added)
            added = 0
        return added == 0

    def _break(self, reason: str) -> None:
        for layer in self.cache.layers:
            if isinstance(layer, RetrievalLayer):
                layer.sequence.broken = f"the sequence is lost: {reason}; start a new cache"


def _is_ours(layer: object) -> bool:
    return isinstance(layer, RetrievalLayer)


def _is_filled(layer: object) -> bool:
    """Whether an ordinary cache layer holds anything."""
    if getattr(layer, "is_initialized", False) and getattr(layer, "keys", None) is not None:
        return True
    return any(getattr(layer, "has_previous_state", {}).values())


def _length(layer: object) -> int | None:
    """Length of a cache layer; None if it has none (a recurrent state that holds something)."""
    if isinstance(layer, RetrievalLayer):
        return layer.get_seq_length()
    if any(getattr(layer, "has_previous_state", {}).values()):
        return None
    if getattr(layer, "is_initialized", False) and hasattr(layer, "get_seq_length"):
        return int(layer.get_seq_length())
    return 0
