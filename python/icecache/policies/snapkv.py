"""SnapKV: once, at the end of the prefill, keep what the last queries of the prompt attend to.

Li et al., "SnapKV: LLM Knows What You are Looking for Before Generation" (arXiv 2404.14469); public code
FasterDecoding/SnapKV, ``snapkv_utils.py``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from icecache.errors import ConfigError
from icecache.select import Baseline, Chosen, Needs, Prompt, StepView, best, capped


@dataclass(frozen=True, slots=True)
class SnapKV(Baseline):
    """Keep the `window` last prompt tokens and the best ``budget - window`` others; never choose again.

    Score of a key: softmax weight from each of the last `window` prompt queries, causal, summed over the queries, then
    pooled over neighbouring positions. Generated tokens are all kept and come on top of the budget.

    Parameters
    ----------
    budget : int
        Tokens of the prompt kept per selection unit.
    window : int, default=32
        Queries that vote, and last tokens kept. 32 in the paper's LongBench settings, 64 the code's default.
    kernel : int, default=7
        Width of the pool, odd. 7 in the LongBench settings, 5 the code's default.
    pool : {"max", "avg"}, default="max"
        "max" in the LongBench settings, "avg" the code's default (zeros beyond the ends count, as there).
    unit : {"query", "kv"}, default="query"
        The authors' code repeats keys before it evicts, so every query head keeps its own tokens; "kv" takes the mean
        score of the group, as later code does.

    Raises
    ------
    ConfigError
        If the window does not leave room in the budget, or a value is out of range.
    """

    budget: int
    window: int = 32
    kernel: int = 7
    pool: Literal["max", "avg"] = "max"
    unit: Literal["query", "kv"] = "query"

    def __post_init__(self) -> None:
        if not 0 < self.window < self.budget:
            msg = f"window must be an integer in 1..budget={self.budget}, got {self.window!r}"
            raise ConfigError(msg)
        if self.kernel < 1 or self.kernel % 2 == 0:
            msg = f"kernel must be odd and at least 1, got {self.kernel!r}"
            raise ConfigError(msg)
        if self.pool not in ("max", "avg") or self.unit not in ("query", "kv"):
            msg = f"pool must be 'max' or 'avg' and unit 'query' or 'kv', got {self.pool!r} and {self.unit!r}"
            raise ConfigError(msg)

    @property
    def name(self) -> str:
        """``snapkv``."""
        return "snapkv"

    @property
    def needs(self) -> Needs:
        """The queries that vote."""
        return Needs(last_queries=self.window)

    @property
    def forgets(self) -> bool:
        """What was not kept is gone."""
        return True

    @property
    def generated_kept(self) -> str:
        """All."""
        return "all"

    def prepare(self, prompt: Prompt) -> dict[str, torch.Tensor]:
        """``kept``: bool (B, H, G or 1, T)."""
        scores = self._pooled(self._votes(prompt))
        if self.unit == "kv":
            scores = scores.mean(2, keepdim=True)
        recent = (prompt.columns >= prompt.lengths[:, None] - self.window) & prompt.valid
        others = (prompt.valid & ~recent)[:, None, None]
        # Pooled by maximum, neighbours have equal scores.
        kept = best(scores, others, self.budget - self.window, first_wins=True)
        return {"kept": kept | recent[:, None, None]}

    def choose(self, view: StepView) -> Chosen:
        """Attend to what was kept, and to everything generated."""
        kept = view.state["kept"]
        missing = view.keys.shape[2] - kept.shape[-1]
        kept = torch.nn.functional.pad(kept, (0, missing)) if missing > 0 else kept[..., : view.keys.shape[2]]
        return Chosen(kept | view.generated()[:, None, None])

    def _votes(self, prompt: Prompt) -> torch.Tensor:
        """(B, H, G, T): softmax weights, summed over the queries; the window itself gets none."""
        assert prompt.queries is not None
        assert prompt.queries_valid is not None
        queries, live = prompt.queries[:, :, :, -self.window :], prompt.queries_valid[:, -self.window :]
        n_queries = queries.shape[3]
        turned = prompt.keys.float().transpose(-1, -2)[:, :, None]
        votes = torch.zeros(*queries.shape[:3], turned.shape[-1], device=turned.device)
        # One query at a time: w times fewer logits at once.
        for i in range(n_queries):
            at = prompt.lengths - n_queries + i
            seen = (prompt.columns <= at[:, None])[:, None, None]
            logits = capped(
                torch.matmul(queries[:, :, :, i, None] * prompt.scaling, turned)[:, :, :, 0], prompt.softcap
            )
            weights = torch.softmax(logits.masked_fill(~seen, float("-inf")), -1).nan_to_num(0.0)
            votes += weights * live[:, i, None, None, None]
        recent = prompt.columns >= prompt.lengths[:, None] - self.window
        return votes.masked_fill(recent[:, None, None], 0.0)

    def _pooled(self, votes: torch.Tensor) -> torch.Tensor:
        flat = votes.flatten(0, 2)[:, None]
        pool = torch.nn.functional.max_pool1d if self.pool == "max" else torch.nn.functional.avg_pool1d
        pooled: torch.Tensor = pool(flat, self.kernel, stride=1, padding=self.kernel // 2)
        return pooled[:, 0].view(votes.shape)
