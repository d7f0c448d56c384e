"""The attention and mask functions registered with transformers under the name "icecache".

The functions are global because transformers' registries are. They hold no state of a model: the key tensor carries its
layer (`_ice_layer`), and the config leads to the implementation the model had before.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from icecache.errors import UnsupportedModelError
from icecache.hf.cache import RetrievalLayer
from icecache.hf.call import Call
from icecache.hf.static import StandIn
from icecache.hf.step import current_step

IMPLEMENTATION = "icecache"
"""Must not contain "sdpa", "flash", "flex" or "/": transformers matches substrings of this name."""

_HARMLESS_ARGUMENTS = frozenset(
    {
        "cache_position",
        "deterministic",
        "dropout",
        "is_causal",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "s_aux",
        "scaling",
        "seq_idx",
        "sliding_window",
        "softcap",
        "use_cache",
    }
)
"""Arguments of attention functions that we honour or that do not change the result. Whatever else an attention class
adds by itself (`position_bias`, `indices`, ...) changes the maths."""

_Output = tuple[torch.Tensor, torch.Tensor | None]
_own_implementations: dict[int, str] = {}
"""Implementation before ``wrap``, by ``id(config)`` of the text config of each wrapped model."""


def remember_own(config: object, implementation: str) -> None:
    """Note what a config's models used before they were wrapped."""
    _own_implementations[id(config)] = implementation


def forget_own(config: object) -> None:
    """Undo `remember_own`."""
    _own_implementations.pop(id(config), None)


def register() -> None:
    """Register both functions with transformers; idempotent."""
    AttentionInterface.register(IMPLEMENTATION, attention)
    AttentionMaskInterface.register(IMPLEMENTATION, mask)


def _own_of(config: object) -> str:
    """Find the implementation to fall back on; sdpa for a config nobody wrapped (a copy can carry our name)."""
    return _own_implementations.get(id(config), "sdpa")


def own_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None,
    arguments: Mapping[str, object],
) -> _Output:
    """Do what the model would have done without us."""
    config = getattr(module, "config", None)
    name = _own_of(config)
    step = current_step()
    if step is not None and step.paged and (attention_mask is None or attention_mask.dim() == 2):
        attention_mask = _own_mask(name, module, query, key, attention_mask)
    if name == "eager":
        function = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
        if function is None:
            msg = f"{type(module).__name__} has no eager attention to fall back on; load the model with sdpa"
            raise UnsupportedModelError(msg)
    else:
        function = ALL_ATTENTION_FUNCTIONS[name]
    return cast("_Output", function(module, query, key, value, attention_mask, scaling=scaling, **arguments))


def _own_mask(
    name: str, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, padding: torch.Tensor | None
) -> torch.Tensor | None:
    """Mask of the model's own kind for a dense layer beside paged ones, which were given None or a 2D mask."""
    if name not in ALL_MASK_ATTENTION_FUNCTIONS:
        return None
    n_queries, n_keys = query.shape[2], key.shape[2]
    make = cast("Callable[..., torch.Tensor | None]", ALL_MASK_ATTENTION_FUNCTIONS[name])
    return make(
        batch_size=query.shape[0],
        q_length=n_queries,
        kv_length=n_keys,
        q_offset=n_keys - n_queries,
        kv_offset=0,
        mask_function=causal_mask_function,
        attention_mask=padding,
        allow_is_causal_skip=True,
        dtype=query.dtype,
        config=getattr(module, "config", None),
        device=query.device,
    )


def _layer_of(key: torch.Tensor) -> RetrievalLayer | StandIn | None:
    """Layer that staged this very tensor, if one of ours did."""
    tag: weakref.ref[RetrievalLayer | StandIn] | None = getattr(key, "_ice_layer", None)
    return None if tag is None else tag()


@dataclass(frozen=True, slots=True)
class _Dense:
    """The model's own attention on given tensors, bound for later."""

    module: torch.nn.Module
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    scaling: float | None
    arguments: Mapping[str, object]

    def __call__(self) -> torch.Tensor:
        return own_attention(self.module, self.query, self.key, self.value, self.mask, self.scaling, self.arguments)[0]


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **arguments: object,
) -> _Output:
    """Attend; the signature is transformers'.

    A key without our tag belongs to another cache, to no cache, to a sliding layer or to an attention class that
    transformed it, and goes the model's own way.
    """
    step = current_step()
    if step is not None:
        step.n_attention_calls += 1
    layer = _layer_of(key)
    if layer is None:
        return own_attention(module, query, key, value, attention_mask, scaling, arguments)
    same_key, same_value = layer.expects(key, value)
    if not same_key:
        msg = f"layer {layer.layer_idx}: stale keys reached the attention function"
        raise UnsupportedModelError(msg)
    shared = layer.staged is None
    problem = _problem(module, same_value, attention_mask, arguments, layer.window)
    if problem is not None:
        if isinstance(layer, RetrievalLayer) and layer.may_turn_dense():
            layer.unsupported = problem  # the closing hook turns it into an ordinary dense layer
            return own_attention(module, query, key, value, attention_mask, scaling, arguments)
        msg = f"layer {layer.layer_idx}: {problem}"
        raise UnsupportedModelError(msg)
    # sdpa knows neither softcap nor sinks (old releases ignore them, new ones raise): decode as prompts are computed.
    ignored = _own_of(getattr(module, "config", None)) == "sdpa"
    call = Call(
        query=query,
        keys=key,
        values=value,
        mask=attention_mask if isinstance(attention_mask, torch.Tensor) else None,
        scaling=query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        softcap=None if ignored else cast("float | None", arguments.get("softcap")),
        sinks=None if ignored else cast("torch.Tensor | None", arguments.get("s_aux")),
        dense=_Dense(module, query, key, value, attention_mask, scaling, arguments),
        shared=shared,
    )
    return layer.attend(call), None


def _problem(
    module: torch.nn.Module,
    same_value: bool,
    mask: torch.Tensor | None,
    arguments: Mapping[str, object],
    window: int | None,
) -> str | None:
    """Why this attention call cannot be served; None: it can."""
    if not same_value:
        return "values are transformed between cache and attention"
    step = current_step()
    from_caller = frozenset() if step is None else step.caller_arguments
    added = {name for name, x in arguments.items() if x is not None} - _HARMLESS_ARGUMENTS - from_caller
    if added:
        return f"the attention class adds arguments that change the result: {', '.join(sorted(added))}"
    if arguments.get("sliding_window") != window:
        return "sliding-window attention on a layer with a full cache" if window is None else "chunked attention"
    if getattr(module, "is_causal", True) is False or arguments.get("is_causal") is False:
        return "the attention is not causal (cross or bidirectional attention)"
    if isinstance(mask, torch.Tensor) and mask.dim() == 4 and mask.shape[1] != 1:
        return "the attention mask differs between heads"
    return None


def mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., object] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    **kwargs: object,
) -> torch.Tensor | None:
    """Build a mask; the signature is transformers'.

    Plain causal masks of a step that reads pages stay None or 2D: nothing of size Q x context is built, and a decode
    step needs no mask at all. Everything else is the model's own mask, so that dense attention is bit-identical.
    """
    step = current_step()
    plain = (
        mask_function is causal_mask_function
        and kwargs.get("local_size") is None
        and bool(kwargs.get("allow_is_causal_skip", True))
        and not kwargs.get("use_vmap", False)
        and isinstance(q_offset, int)
        and q_offset + q_length == kv_length  # False for the padded layout of a StaticCache
    )
    if step is not None and step.device is not None and kwargs.get("allow_is_causal_skip", True):
        return None  # every layer of a captured step knows what it sees, causal or sliding (`_problem` checks which)
    if step is not None and step.paged and plain:
        return None if attention_mask is None else attention_mask[:, -kv_length:]
    make = cast("Callable[..., torch.Tensor | None]", ALL_MASK_ATTENTION_FUNCTIONS[_own_of(kwargs.get("config"))])
    result = make(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=q_offset,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **kwargs,
    )
    if step is not None and plain:
        step.causal_mask, step.padding = result, attention_mask
    return result
