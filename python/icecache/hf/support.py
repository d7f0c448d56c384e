"""Can this model be served? Checked without class names, before anything is changed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from icecache.errors import ConfigError, UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

RETRIEVAL = "retrieval"


def text_config_of(model: PreTrainedModel) -> PreTrainedConfig:
    """Config of the text decoder, which may be a sub-config of a multimodal model."""
    return model.config.get_text_config(decoder=True)


def layer_plan(model: PreTrainedModel, dense_layers: frozenset[int]) -> list[str]:
    """Say for each layer how its cache is kept: "retrieval", or the class name of its ordinary cache layer.

    Raises
    ------
    UnsupportedModelError
        If the model cannot be served at all; the message says why.
    ConfigError
        If `dense_layers` names a layer that does not exist.
    """
    if model.config.is_encoder_decoder:
        msg = "encoder-decoder models keep a separate cross-attention cache"
        raise UnsupportedModelError(msg)
    can_set = getattr(type(model), "_can_set_attn_implementation", None)
    if can_set is None or not can_set():
        msg = f"{type(model).__name__} does not dispatch its attention through AttentionInterface"
        raise UnsupportedModelError(msg)
    layers = DynamicCache(config=text_config_of(model)).layers
    for i in dense_layers:
        if i >= len(layers):
            msg = f"dense_layers must name layers in 0..={len(layers) - 1}, got {i}"
            raise ConfigError(msg)
    plan = [
        RETRIEVAL if type(layer) is DynamicLayer and i not in dense_layers else type(layer).__name__
        for i, layer in enumerate(layers)
    ]
    if RETRIEVAL not in plan:
        kinds = ", ".join(sorted(set(plan))) or "none"
        msg = f"no layer with plain full attention to serve; cache layers of this model: {kinds}"
        raise UnsupportedModelError(msg)
    return plan


def layer_groups(plan: Sequence[str], reuse: int) -> list[tuple[int, ...]]:
    """Cut the retrieval layers, in order, into groups of `reuse` that share pages; the last group may be smaller.

    Layers of other kinds do not count, wherever they stand: a model that alternates sliding and full attention shares
    the pages of every `reuse` layers with full attention.
    """
    retrieval = [i for i, kind in enumerate(plan) if kind == RETRIEVAL]
    return [tuple(retrieval[first : first + reuse]) for first in range(0, len(retrieval), reuse)]


def implementation_key(model: PreTrainedModel) -> str | None:
    """Key of the text config among the model's sub-configs; None: it is the model's config itself."""
    config, text = model.config, text_config_of(model)
    if text is config:
        return None
    for key in config.sub_configs:
        if getattr(config, key, None) is text:
            return str(key)
    msg = "the text decoder's config is not a direct sub-config of the model's config"
    raise UnsupportedModelError(msg)


def set_implementation(model: PreTrainedModel, name: str) -> None:
    """Set the attention implementation of the text decoder only; a vision tower keeps its own."""
    key = implementation_key(model)
    if key is not None:
        model.set_attn_implementation({key: name})
    else:
        model.set_attn_implementation({"": name} if model.config.sub_configs else name)
