"""OmniKV: a few layers attend to everything and choose for the layers behind them.

Hao et al., "OmniKV: Dynamic Context Selection for Efficient Long-Context LLMs" (ICLR 2025); public code
antgroup/OmniKV, ``offload_select_once.py`` and README.
"""

from __future__ import annotations

from dataclasses import dataclass

from icecache.errors import ConfigError
from icecache.select import Baseline, Chosen, StepView, best

_SMALL = 16


@dataclass(frozen=True, slots=True)
class OmniKV(Baseline):
    """At filter layers, the prompt tokens of the largest logits, for all heads of all layers up to the next filter.

    Score of a prompt token: the raw logit of the newest token, maximum over all query heads of the filter layer.
    Generated tokens are all kept, on top of the budget; there is neither sink nor window. Dense are the layers before
    the first filter, the filters, and `wait` layers behind each: 8 of 32 as published.

    Parameters
    ----------
    budget : int
        Prompt tokens attended. Published: 6.7 % of the prompt in the example configuration.
    filters : tuple of int or None, default=None
        Filter layers; (2, 8, 18) published for 32 layers. None: these, scaled to the model; in a model of fewer than 16
        layers the one at a quarter of its depth.
    wait : int or None, default=None
        Dense layers behind each filter; 1 published ("dense_more"). None: 1, in a model of fewer than 16 layers 0.

    Raises
    ------
    ConfigError
        If a value is out of range.
    """

    budget: int
    filters: tuple[int, ...] | None = None
    wait: int | None = None

    def __post_init__(self) -> None:
        if self.budget < 1 or (self.wait is not None and self.wait < 0):
            msg = f"budget must be at least 1 and wait at least 0, got {self.budget!r} and {self.wait!r}"
            raise ConfigError(msg)
        if self.filters is not None and (not self.filters or min(self.filters) < 0):
            msg = f"filters must name at least one layer, got {self.filters!r}"
            raise ConfigError(msg)

    @property
    def name(self) -> str:
        """``omnikv``."""
        return "omnikv"

    @property
    def generated_kept(self) -> str:
        """All."""
        return "all"

    def filter_layers(self, n_layers: int) -> tuple[int, ...]:
        """Layers that choose, in a model of `n_layers`."""
        if self.filters is not None:
            return self.filters
        return (n_layers // 4,) if n_layers < _SMALL else tuple(round(n_layers * at / 32) for at in (2, 8, 18))

    def own_dense_layers(self, n_layers: int) -> tuple[int, ...]:
        """Layers before the first filter, filters, and those that wait."""
        wait = self.wait if self.wait is not None else int(n_layers >= _SMALL)
        filters = self.filter_layers(n_layers)
        behind = {layer for at in filters for layer in range(at, at + wait + 1)}
        return tuple(sorted(layer for layer in {*range(min(filters)), *behind} if layer < n_layers))

    def choose(self, view: StepView) -> Chosen:
        """Attend to everything in a dense layer, elsewhere to what the last filter chose."""
        key = f"omnikv {view.keys.shape[2]}"  # layer by layer: the tokens of a chunk each have their own choice
        chosen, is_dense = view.shared.get(key), view.layer in self.own_dense_layers(view.n_layers)
        # If all filters are dense by the config, nobody chose in this step: the first layer that is asked does.
        if view.layer in self.filter_layers(view.n_layers) or (chosen is None and not is_dense):
            prompt = view.valid & ~view.generated()
            view.shared[key] = best(view.logits.amax((1, 2)), prompt, self.budget)
            is_dense = True
        if is_dense:
            return Chosen(view.valid[:, None, None], dense=True)
        assert chosen is not None
        return Chosen((chosen | view.generated())[:, None, None])
