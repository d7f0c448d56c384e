"""ArkVale: pages of neighbouring tokens, one choice per layer, by the bound of a shrunken box around the keys.

Chen et al., "ArkVale: Efficient Generative LLM Inference with Recallable Key-Value Eviction" (NeurIPS 2024); public
code pku-liang/ArkVale, ``infer_state.py`` and ``estimate.cu``.
"""

from __future__ import annotations

from dataclasses import dataclass

from icecache.errors import ConfigError
from icecache.select import Baseline, Chosen, StepView, best, in_pages, of_pages


@dataclass(frozen=True, slots=True)
class ArkVale(Baseline):
    """All heads of a layer attend to the same ``budget / page_tokens`` pages: sink, window, and those recalled.

    Digest of a filled page ("cuboid-mean"), per channel: centre ``c = (max + min) / 2``, half width ``mean |k - c|``.
    Score: ``sum_i max(q_i (c_i + h_i), q_i (c_i - h_i))``, mean over all query heads of the layer. Published with
    layers 0 and 1 dense. The public scripts attend to every page in the device's cache, the recalled ones and
    stale ones (32 recalled into 128); here the cache holds exactly the chosen pages.

    Parameters
    ----------
    budget : int
        Tokens per layer, sink and window included; of the newest page only the tokens that exist.
    page_tokens : int, default=16
        16 or 32 are published; 32 is the default of the LongBench script, 16 lets small budgets have pages.
    sink_pages, window_pages : int, default=1 and 2
        First pages, and last ones (the one being filled included). The published script takes 2 sink pages; with 1
        a budget of 4 pages still recalls one.

    Raises
    ------
    ConfigError
        If no page is left to be recalled.
    """

    budget: int
    page_tokens: int = 16
    sink_pages: int = 1
    window_pages: int = 2

    def __post_init__(self) -> None:
        if self.page_tokens < 1 or self.sink_pages < 0 or self.window_pages < 1 or self._recalled < 1:
            msg = (
                f"budget must hold more than {self.sink_pages} sink and {self.window_pages} window pages of "
                f"{self.page_tokens} tokens, got {self.budget!r}"
            )
            raise ConfigError(msg)

    @property
    def name(self) -> str:
        """``arkvale``."""
        return "arkvale"

    @property
    def _recalled(self) -> int:
        return self.budget // self.page_tokens - self.sink_pages - self.window_pages

    def choose(self, view: StepView) -> Chosen:
        """Attend to sink, window, and the pages of the largest mean bound."""
        size, n_columns = self.page_tokens, view.keys.shape[2]
        paged = in_pages(view.keys, 2, size, 0.0)  # pages that are not full are never candidates
        low, high = paged.amin(3).float(), paged.amax(3).float()
        centre = (low + high) / 2
        width = (paged.float() - centre[:, :, :, None]).abs().mean(3)
        bound = view.query @ centre.transpose(-1, -2) + view.query.abs() @ width.transpose(-1, -2)
        scores = bound.mean((1, 2))  # (B, pages)
        page = view.columns[::size] // size
        first_of_window = (view.lengths[:, None] - 1) // size - (self.window_pages - 1)
        near = (page < self.sink_pages) | (page >= first_of_window)
        pages = best(scores, ~near, self._recalled) | near
        return Chosen((of_pages(pages, size, n_columns) & view.valid)[:, None, None])
