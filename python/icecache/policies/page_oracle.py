"""Page oracle over positional pages: what the best choice of pages is worth when pages are runs of the text.

Beside ``page-oracle``, which chooses from our pages by meaning, it separates how tokens are packed from how pages are
found.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from icecache.errors import ConfigError
from icecache.select import Baseline, Chosen, StepView, best, in_pages, of_pages


@dataclass(frozen=True, slots=True)
class PositionalPageOracle(Baseline):
    """Sink and window as in the runtime, and per KV head the pages with the most softmax weight over the query group.

    Parameters
    ----------
    budget : int
        Tokens per KV head, sink and window included, the newest token not.
    sink, window : int
        First and last tokens that are always attended; pages are cut behind the sink.
    page_tokens : int, default=16
        Tokens per page.

    Raises
    ------
    ConfigError
        If no page fits into the budget.
    """

    budget: int
    sink: int = 16
    window: int = 32
    page_tokens: int = 16

    def __post_init__(self) -> None:
        if self.page_tokens < 1 or self._n_pages < 1:
            msg = f"budget must hold sink, window and a page of {self.page_tokens} tokens, got {self.budget!r}"
            raise ConfigError(msg)

    @property
    def name(self) -> str:
        """``page-oracle-positional``."""
        return "page-oracle-positional"

    @property
    def _n_pages(self) -> int:
        return (self.budget - self.sink - self.window) // self.page_tokens

    def choose(self, view: StepView) -> Chosen:
        """Attend to the pages of the largest true weight."""
        near = view.sink_and_window(self.sink, self.window)
        middle = view.valid & ~near
        weights = torch.softmax(view.logits.masked_fill(~middle[:, None, None], float("-inf")), -1)
        mass = weights.nan_to_num(0.0).sum(2)  # (B, H, T)
        paged = in_pages(mass[..., self.sink :], 2, self.page_tokens, 0.0).sum(-1)
        live = in_pages(middle[:, self.sink :], 1, self.page_tokens, 0.0).any(-1)
        pages = best(paged, live[:, None], self._n_pages)
        columns = of_pages(pages, self.page_tokens, max(view.keys.shape[2] - self.sink, 0))
        columns = torch.nn.functional.pad(columns, (view.keys.shape[2] - columns.shape[2], 0))
        return Chosen(((columns & middle[:, None]) | near[:, None])[:, :, None])
