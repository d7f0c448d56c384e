"""Quest: pages of 16 neighbouring tokens, chosen at every step by an upper bound of their logits.

Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference" (arXiv 2406.10774); public code
mit-han-lab/Quest, ``evaluation/quest_attention.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

from icecache.errors import ConfigError
from icecache.select import Baseline, Chosen, StepView, best, in_pages, of_pages


@dataclass(frozen=True, slots=True)
class Quest(Baseline):
    """Each query head attends to the ``max(3, budget / page_tokens)`` pages of the largest bound.

    Bound of a page: ``sum_i max(q_i min_i, q_i max_i)`` over the channels, with the smallest and largest key per
    channel. Nothing is kept by force, not even the page of the newest token; generated tokens join the pages.
    Published with layers 0 and 1 dense.

    Parameters
    ----------
    budget : int
        Tokens per query head.
    page_tokens : int, default=16
        The published size.

    Raises
    ------
    ConfigError
        If a value is below 1.
    """

    budget: int
    page_tokens: int = 16

    def __post_init__(self) -> None:
        if self.budget < 1 or self.page_tokens < 1:
            msg = f"budget and page_tokens must be at least 1, got {self.budget!r} and {self.page_tokens!r}"
            raise ConfigError(msg)

    @property
    def name(self) -> str:
        """``quest``."""
        return "quest"

    def choose(self, view: StepView) -> Chosen:
        """Pages of the largest bounds."""
        outside = ~view.valid[:, None, :, None]
        low = in_pages(view.keys.masked_fill(outside, float("inf")), 2, self.page_tokens, float("inf")).amin(3)
        high = in_pages(view.keys.masked_fill(outside, float("-inf")), 2, self.page_tokens, float("-inf")).amax(3)
        live = in_pages(view.valid, 1, self.page_tokens, 0).any(2)  # (B, pages)
        empty = ~live[:, None, :, None]
        low, high = low.masked_fill(empty, 0.0).float(), high.masked_fill(empty, 0.0).float()
        # max(q min, q max) is q max where q is positive and q min elsewhere.
        bound = view.query.clamp(min=0) @ high.transpose(-1, -2) + view.query.clamp(max=0) @ low.transpose(-1, -2)
        pages = best(bound, live[:, None, None], max(3, self.budget // self.page_tokens))
        return Chosen(of_pages(pages, self.page_tokens, view.keys.shape[2]) & view.valid[:, None, None])
