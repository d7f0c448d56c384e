"""StreamingLLM with its positions: sink and window, numbered by their place in the cache and not in the text.

Xiao et al., "Efficient Streaming Language Models with Attention Sinks" (arXiv 2309.17453).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from icecache.errors import ConfigError, UnsupportedModelError
from icecache.select import Baseline, Chosen, StepView

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class RenumberedStreaming(Baseline):
    """The first `sink` and the last ``budget - sink`` tokens, as if nothing had ever been between them.

    After a dense prefill keys carry the rotation of their place in the text. Attention sees differences of positions
    only, so it is enough to turn the keys of the sink forward by the number of tokens that are left out. ``streaming``
    is the same without the turn, on less memory.

    Parameters
    ----------
    budget : int
        Tokens of all heads, the newest one not counted.
    frequencies : sequence of float
        Angle per position of each pair of channels ``(i, i + n)``, i < n: ``rotary_emb.inv_freq`` in models of the
        Llama family. :func:`frequencies_of` reads them.
    sink : int, default=4
        As published.

    Raises
    ------
    ConfigError
        If the sink leaves no window, or there are no frequencies.
    """

    budget: int
    frequencies: tuple[float, ...]
    sink: int = 4

    def __post_init__(self) -> None:
        object.__setattr__(self, "frequencies", tuple(self.frequencies))
        if not 0 <= self.sink < self.budget:
            msg = f"sink must be in 0..budget={self.budget}, got {self.sink!r}"
            raise ConfigError(msg)
        if not self.frequencies:
            msg = "frequencies must name the angle of at least one pair of channels, got none"
            raise ConfigError(msg)

    @property
    def name(self) -> str:
        """``streaming-renumbered``."""
        return "streaming-renumbered"

    @property
    def forgets(self) -> bool:
        """What left the window is gone."""
        return True

    @property
    def generated_kept(self) -> str:
        """Until they leave the window."""
        return "window"

    def choose(self, view: StepView) -> Chosen:
        """Attend to sink and window, the sink brought near."""
        mask = view.sink_and_window(self.sink, self.budget - self.sink)
        n_turned = min(self.sink, view.keys.shape[2])
        left_out = (view.lengths - mask.sum(1)).float()
        angles = left_out[:, None] * torch.tensor(self.frequencies, device=view.keys.device)
        turned = _turn(view.keys[:, :, :n_turned].float(), angles[:, None, None])
        logits = torch.matmul(view.query * view.scaling, turned.transpose(-1, -2))
        if view.softcap is not None:
            logits = view.softcap * torch.tanh(logits / view.softcap)
        bias = torch.zeros_like(view.logits)
        bias[..., :n_turned] = torch.where(mask[:, None, None, :n_turned], logits - view.logits[..., :n_turned], 0.0)
        return Chosen(mask[:, None, None], bias=bias)


def _turn(keys: torch.Tensor, angles: torch.Tensor) -> torch.Tensor:
    """Rotate channel pairs (i, i + n) of keys (..., D) by angles (..., n); channels behind the pairs stay."""
    n = angles.shape[-1]
    first, second, rest = keys[..., :n], keys[..., n : 2 * n], keys[..., 2 * n :]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


def frequencies_of(model: PreTrainedModel) -> tuple[float, ...]:
    """Read the rotary frequencies of a model of the Llama family.

    Raises
    ------
    UnsupportedModelError
        If the model has none, several sets of them, or pairs other channels.
    """
    found: list[Sequence[float]] = []
    for module in model.modules():
        values = getattr(module, "inv_freq", None)
        if isinstance(values, torch.Tensor) and values.tolist() not in found:
            found.append(values.tolist())
    rotate = getattr(sys.modules[type(model).__module__], "rotate_half", None)
    halves = rotate is not None and rotate(torch.arange(4.0)).tolist() == [-2.0, -3.0, 0.0, 1.0]
    if len(found) != 1 or not halves:
        msg = f"{type(model).__name__}: re-numbering needs one set of rotary frequencies that turn halves of a key"
        raise UnsupportedModelError(msg)
    return tuple(found[0])
