"""Oracle sampling: tokens drawn from the true softmax, values averaged. What an ideal sampler could do.

Compared with in Chen et al., "MagicPIG: LSH Sampling for Efficient LLM Generation" (arXiv 2410.16179); public code
Infini-AI-Lab/MagicPIG, ``oraclesampling_cache.py``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from icecache.errors import ConfigError
from icecache.select import Baseline, Chosen, StepView


@dataclass(frozen=True, slots=True)
class OracleSampling(Baseline):
    """Each query head draws `budget` tokens with replacement from its softmax and takes the mean of their values.

    An unbiased estimate. Tokens drawn several times are loaded once: the tokens attended are the different ones.

    Parameters
    ----------
    budget : int
        Draws per query head.
    seed : int, default=0
        The draw depends on it, on the layer and on the length of the batch.

    Raises
    ------
    ConfigError
        If `budget` is below 1.
    """

    budget: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.budget < 1:
            msg = f"budget must be at least 1, got {self.budget!r}"
            raise ConfigError(msg)

    @property
    def name(self) -> str:
        """``oracle-sampling``."""
        return "oracle-sampling"

    def choose(self, view: StepView) -> Chosen:
        """Attend to the mean of the draws."""
        shape, device = view.logits.shape, view.logits.device
        seed = hash((self.seed, view.layer, shape[-1])) & (2**63 - 1)
        generator = torch.Generator(device).manual_seed(seed)
        below = torch.softmax(view.logits, -1, dtype=torch.float64).cumsum(-1)
        draws = torch.rand(*shape[:-1], self.budget, generator=generator, device=device, dtype=torch.float64)
        drawn = torch.searchsorted(below, draws * below[..., -1:], right=True).clamp(max=shape[-1] - 1)
        counts = torch.zeros(shape, device=device).scatter_add(-1, drawn, torch.ones_like(drawn, dtype=torch.float32))
        return Chosen(counts > 0, weights=counts / self.budget)
