"""Full attention: the model's own, bit for bit; and the same as a prefill that later runs of any policy share."""

from __future__ import annotations

from dataclasses import dataclass

from icecache.errors import ConfigError
from icecache.select import Baseline, Chosen, Needs, StepView


@dataclass(frozen=True, slots=True)
class Full(Baseline):
    """Softmax over everything. Every layer stays an ordinary dense cache, whatever ``dense_below`` says."""

    @property
    def name(self) -> str:
        """``full``."""
        return "full"

    @property
    def generated_kept(self) -> str:
        """All."""
        return "all"

    @property
    def always_dense(self) -> bool:
        """Yes."""
        return True

    def choose(self, view: StepView) -> Chosen:
        """Everything; only asked by a caller that masks by itself."""
        return Chosen(view.valid[:, None, None])


@dataclass(frozen=True, slots=True)
class Prefill(Full):
    """Full attention that takes notes, so that one dense prefill serves runs of every policy through ``adopt``.

    Parameters
    ----------
    last_queries : int, default=64
        Queries kept of so many of the last positions; 64 serve every policy here.
    attention : bool, default=False
        Sum up the attention over the prompt. Costs a second pass over all logits; only ``h2o`` needs it.

    Raises
    ------
    ConfigError
        If `last_queries` is negative.

    Examples
    --------
    >>> with IceRuntime.wrap(model, policy=Prefill()) as runtime:
    ...     prefilled = runtime.new_cache()
    ...     model(input_ids=context, past_key_values=prefilled)
    >>> with IceRuntime.wrap(model, policy="snapkv", budget=256, dense_below=0) as runtime:
    ...     model.generate(context_and_question, past_key_values=runtime.adopt(prefilled))
    """

    last_queries: int = 64
    attention: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.last_queries, bool) or not isinstance(self.last_queries, int) or self.last_queries < 0:
            msg = f"last_queries must be an integer of at least 0, got {self.last_queries!r}"
            raise ConfigError(msg)

    @property
    def needs(self) -> Needs:
        """What the parameters say."""
        return Needs(self.last_queries, self.attention)
