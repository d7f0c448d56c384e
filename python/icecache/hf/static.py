"""Layers without pages (dense ones, and those with a sliding window) inside a captured decode step.

Such a layer grows by concatenation, which no graph can repeat. While its step is rehearsed and captured a *stand-in*
takes its place in the cache: it hands the new token on to the attention function, which attends on static buffers that
hold what the layer keeps.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from icecache.attention import StaticKV, StaticShape
from icecache.errors import UnsupportedModelError

if TYPE_CHECKING:
    from icecache.hf.call import Call, Pair


@dataclass(frozen=True, slots=True)
class StaticLayer:
    """A cache layer of transformers' own that can be part of a captured step.

    Parameters
    ----------
    number : int
        Of the layer in the model.
    window : int or None
        Of sliding-window attention, the query's own position included.
    """

    number: int
    layer: DynamicLayer
    window: int | None

    def shape(self) -> StaticShape:
        """Describe the buffers for this layer."""
        return StaticShape.of(self.number, self.layer, self.window)


def static_layer(number: int, layer: object, length: int) -> StaticLayer | str | None:
    """Read a cache layer that is none of ours.

    Returns
    -------
    StaticLayer, str or None
        A reason why no step with such a layer can be captured; None: this one cannot, others may.
    """
    window: int | None = getattr(layer, "sliding_window", None)
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer) or window in (0, 1):
        return f"layer {number} keeps an ordinary cache of its own kind ({type(layer).__name__})"
    assert isinstance(layer, DynamicLayer)
    if not layer.is_initialized:
        return f"layer {number} keeps no keys of its own"
    if getattr(layer, "record_past", False) or layer.get_seq_length() != length or layer.keys.dim() != 4:
        return None
    if layer.keys.shape[2] != (length if window is None else min(length, window - 1)):
        return None
    return StaticLayer(number, layer, window)


class StandIn(CacheLayerMixin):  # type: ignore[misc]
    """Takes one token of one layer to its static buffers.

    Parameters
    ----------
    buffers : StaticKV
    static : StaticLayer
        The layer in whose place it stands.
    length : int
        Positions before the step.
    """

    is_compileable = False
    is_croppable = False

    def __init__(self, buffers: StaticKV, static: StaticLayer, length: int) -> None:
        super().__init__()
        self.is_sliding = static.layer.is_sliding
        self.window, self.layer_idx = static.window, static.number
        self.staged: Pair | None = None
        self.attended = False
        self._buffers, self._length = buffers, length
        self._last: tuple[weakref.ref[torch.Tensor], weakref.ref[torch.Tensor]] | None = None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do."""

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *args: object,  # noqa: ARG002 - transformers' signature
        **kwargs: object,  # noqa: ARG002
    ) -> Pair:
        """Stage the token and return what attention must be called with, tagged."""
        self.staged, self._last = (key_states, value_states), (weakref.ref(key_states), weakref.ref(value_states))
        key_states._ice_layer = weakref.ref(self)  # type: ignore[attr-defined]
        self._length += key_states.shape[-2]
        return key_states, value_states

    def get_seq_length(self) -> int:
        """Positions, those of the step under way included."""
        return self._length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As if everything were kept; no mask is made in a captured step."""
        return self._length + query_length, 0

    def get_max_length(self) -> int:
        """-1: no bound."""
        return -1

    get_max_cache_shape = get_max_length  # the name up to transformers 5.9

    def expects(self, key: torch.Tensor, value: torch.Tensor) -> tuple[bool, bool]:
        """Whether (key, value) are the tensors of the last `update`."""
        last = (None, None) if self._last is None else (self._last[0](), self._last[1]())
        return last[0] is key, last[1] is value

    def attend(self, call: Call) -> torch.Tensor:
        """Attend with the token and everything before it: (B, 1, n_q_heads, E)."""
        if call.shared:
            msg = f"layer {self.layer_idx}: its keys are attended to by another layer"
            raise UnsupportedModelError(msg)
        if call.mask is not None:
            msg = f"layer {self.layer_idx}: its mask is neither causal nor sliding"
            raise UnsupportedModelError(msg)
        self.staged, self.attended = None, True
        out, lse = self._buffers.attend(self.layer_idx, call.query, call.keys, call.values, call.scaling, call.softcap)
        return out if call.sinks is None else with_sinks(out, lse, call.sinks)

    def check_attended(self) -> None:
        """Raise UnsupportedModelError if the token never reached the attention function, or not unchanged."""
        if not self.attended:
            msg = f"layer {self.layer_idx}: keys and values given to the cache never reached the attention function"
            raise UnsupportedModelError(msg)


def with_sinks(out: torch.Tensor, lse: torch.Tensor, sinks: torch.Tensor) -> torch.Tensor:
    """Let learned sink logits take their share of the softmax.

    Parameters
    ----------
    out : torch.Tensor
        (B, 1, n_q_heads, E): attention without them.
    lse : torch.Tensor
        (B, H, G) float32: its log-sum-exp.
    sinks : torch.Tensor
        (n_q_heads,)
    """
    share = torch.sigmoid(lse.reshape(lse.shape[0], 1, -1, 1) - sinks.float().view(1, 1, -1, 1))
    return (out * share).to(out.dtype)
