"""H2O: keep the tokens that collected the most attention so far, and the newest ones; drop the rest for good.

Zhang et al., "H2O: Heavy-Hitter Oracle for Efficient Generative Inference of Large Language Models" (arXiv 2306.14048);
public code FMInference/H2O, ``h2o_hf``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from icecache.errors import ConfigError
from icecache.select import Baseline, Chosen, Needs, Prompt, StepView, best


@dataclass(frozen=True, slots=True)
class H2O(Baseline):
    """Keep ``budget / 2`` heavy hitters and the ``budget - budget / 2`` newest tokens per KV head.

    Score of a token: the softmax weights it got from every query of the prompt and of every step since, while it was
    kept; summed over the query group (the published code has one query head per KV head). At each step the newest
    token is attended on top of the budget; then its weights are counted and the weakest token outside the newest ones
    is dropped.

    Parameters
    ----------
    budget : int
        Tokens kept per KV head. Half and half is the published default.

    Raises
    ------
    ConfigError
        If `budget` is below 2.
    """

    budget: int

    def __post_init__(self) -> None:
        if self.budget < 2:
            msg = f"budget must be at least 2, got {self.budget!r}"
            raise ConfigError(msg)

    @property
    def name(self) -> str:
        """``h2o``."""
        return "h2o"

    @property
    def needs(self) -> Needs:
        """Attention over the whole prompt."""
        return Needs(attention=True)

    @property
    def forgets(self) -> bool:
        """What was dropped is gone."""
        return True

    @property
    def generated_kept(self) -> str:
        """They compete like all others."""
        return "scored"

    def prepare(self, prompt: Prompt) -> dict[str, torch.Tensor]:
        """``scores``: float32 (B, H, T); ``kept``: bool (B, H, T)."""
        assert prompt.attention is not None
        everything = prompt.valid[:, None].expand(prompt.attention.shape)
        kept = self._survivors(prompt.attention, everything, prompt.columns, prompt.lengths)
        return {"scores": prompt.attention, "kept": kept}

    def choose(self, view: StepView) -> Chosen:
        """Attend to what is kept and to the newest token, then count and drop."""
        n_columns = view.keys.shape[2]
        missing = n_columns - view.state["kept"].shape[2]
        kept = pad(view.state["kept"], (0, missing)) & view.valid[:, None]
        mask = kept | view.newest[:, None]
        weights = torch.softmax(view.logits.masked_fill(~mask[:, :, None], float("-inf")), -1)
        scores = pad(view.state["scores"], (0, missing)).masked_fill(view.newest[:, None], 0.0) + weights.sum(2)
        survivors = self._survivors(scores, mask, view.columns, view.lengths)
        return Chosen(mask[:, :, None], state={"scores": scores, "kept": survivors})

    def _survivors(
        self, scores: torch.Tensor, held: torch.Tensor, columns: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        """Which of the `held` tokens stay."""
        n_heavy = self.budget // 2
        recent = (columns >= lengths[:, None] - (self.budget - n_heavy))[:, None]
        return (held & recent) | best(scores, held & ~recent, n_heavy)
