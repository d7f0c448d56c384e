"""Quest: pages of 16 neighbouring tokens, chosen at every step by an upper bound of their logits.

Tang et al., "Quest: Query-Aware Sparsity for Efficient Long-Context LLM Inference" (arXiv 2406.10774); public code
mit-han-lab/Quest, ``evaluation/quest_attention.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from icecache.errors import ConfigError
from icecache.select import Baseline, Chosen, StepView, best, of_pages


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
        low, high, live = page_bounds(view.keys, view.lengths, self.page_tokens)
        # max(q min, q max) is q max where q is positive and q min elsewhere.
        bound = view.query.clamp(min=0) @ high.transpose(-1, -2) + view.query.clamp(max=0) @ low.transpose(-1, -2)
        pages = best(bound, live[:, None, None], max(3, self.budget // self.page_tokens))
        return Chosen(of_pages(pages, self.page_tokens, view.keys.shape[2]) & view.valid[:, None, None])


def page_bounds(
    keys: torch.Tensor, lengths: torch.Tensor, page_tokens: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Smallest and largest key of each page, channel by channel, without a copy of all keys.

    Parameters
    ----------
    keys : torch.Tensor
        (B, H, T, D); what stands behind the end of a row does not count.
    lengths : torch.Tensor
        int64 (B,), at least 1.
    page_tokens : int
        Tokens of a page; the last one may be shorter.

    Returns
    -------
    low, high : torch.Tensor
        float32 (B, H, pages, D); 0 where a page holds no token.
    live : torch.Tensor
        Bool (B, pages): pages with tokens.
    """
    n_rows, n_heads, n_columns, dim = keys.shape
    n_full = n_columns // page_tokens
    full, rest = keys[:, :, : n_full * page_tokens], keys[:, :, n_full * page_tokens :]
    pages = full.view(n_rows, n_heads, n_full, page_tokens, dim)
    low, high = pages.amin(3), pages.amax(3)  # two passes: on a CPU `aminmax` over this axis takes six times as long
    if rest.shape[2]:
        low, high = torch.cat([low, rest.amin(2, keepdim=True)], 2), torch.cat([high, rest.amax(2, keepdim=True)], 2)
    # The page in which a row ends, again, without what stands behind the end.
    last = (lengths - 1) // page_tokens
    columns = last[:, None] * page_tokens + torch.arange(page_tokens, device=keys.device)
    behind = (columns >= lengths[:, None])[:, None, :, None]
    at = columns.clamp_max(n_columns - 1)[:, None, :, None].expand(-1, n_heads, -1, dim)
    ending, where = keys.gather(2, at), last[:, None, None, None].expand(n_rows, n_heads, 1, dim)
    low = low.scatter(2, where, ending.masked_fill(behind, float("inf")).amin(2, keepdim=True))
    high = high.scatter(2, where, ending.masked_fill(behind, float("-inf")).amax(2, keepdim=True))
    live = torch.arange(low.shape[2], device=keys.device) <= last[:, None]
    empty = ~live[:, None, :, None]
    return low.masked_fill(empty, 0.0).float(), high.masked_fill(empty, 0.0).float(), live
