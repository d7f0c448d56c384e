"""Token oracle: the tokens with the most softmax weight, by brute force. No index can choose better ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from icecache.errors import ConfigError
from icecache.select import Baseline, Chosen, StepView, best, group_weight


@dataclass(frozen=True, slots=True)
class TokenOracle(Baseline):
    """Sink and window as in the runtime, and the best of the others up to the budget.

    Parameters
    ----------
    budget : int
        Tokens per selection unit, sink and window included, the newest token not.
    sink, window : int
        First and last tokens that are always attended.
    unit : {"kv", "query"}, default="kv"
        "kv": one choice per KV head, by the softmax weights summed over its query group; what one transfer per KV head
        can do at best. "query": one per query head, an upper bound that may load up to G times as much.

    Raises
    ------
    ConfigError
        If nothing is left of the budget, or the unit is unknown.
    """

    budget: int
    sink: int = 16
    window: int = 32
    unit: Literal["kv", "query"] = "kv"

    def __post_init__(self) -> None:
        if self.sink < 0 or self.window < 0 or self.budget <= self.sink + self.window:
            msg = f"budget must be larger than sink + window = {self.sink + self.window}, got {self.budget!r}"
            raise ConfigError(msg)
        if self.unit not in ("kv", "query"):
            msg = f"unit must be 'kv' or 'query', got {self.unit!r}"
            raise ConfigError(msg)

    @property
    def name(self) -> str:
        """``token-oracle`` or ``token-oracle-q``."""
        return "token-oracle" if self.unit == "kv" else "token-oracle-q"

    def choose(self, view: StepView) -> Chosen:
        """Attend to the best tokens of this very step."""
        near = view.sink_and_window(self.sink, self.window)[:, None, None]
        others = view.valid[:, None, None] & ~near
        scores = view.logits
        if self.unit == "kv":
            scores = group_weight(scores.masked_fill(~others, float("-inf")))
        return Chosen(best(scores, others, self.budget - self.sink - self.window) | near)
