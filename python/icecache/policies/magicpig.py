"""MagicPIG: tokens sampled by locality sensitive hashing, their logits corrected for the chance of being sampled.

Chen et al., "MagicPIG: LSH Sampling for Efficient LLM Generation" (arXiv 2410.16179); public code
Infini-AI-Lab/MagicPIG, ``attnserver.py``, ``lsh.cc`` and ``sparse_attention.cc``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from icecache.errors import ConfigError
from icecache.select import Baseline, Chosen, Needs, Prompt, StepView

_MOST_TABLES = 200
_FEWEST_TABLES = 8
_TABLES_AT_ONCE = 10
_BITS = (10, 9, 11, 8, 12, 7, 13, 6, 14, 5, 4, 3, 2, 1)
"""In the order in which they are tried: the published 10 first."""


@dataclass(frozen=True, slots=True)
class MagicPIG(Baseline):
    """A prompt token is attended if its hash meets the query's in at least two of L tables of K bits.

    Keys are centred by their mean over the prompt, hashes are signs of random projections. For the angle theta between
    query and centred key let ``p = (1 - theta / pi)^K``; the chance of being sampled is
    ``w = 1 - (1 - p)^(L - 1) (1 - p + L p)``, and the logit is lowered by ``log(w + 1e-4)``. Sink, last prompt tokens
    and everything generated are attended exactly; all of it is one softmax. How many tokens are sampled is random.

    Parameters
    ----------
    budget : int
        Mean of the prompt tokens attended per query head. K and L are tuned for it, per layer, so that the last queries
        of the prompt would sample as many in expectation; ``stats().parameters`` reports them.
    sink : int, default=4
        Published.
    local : int or None, default=None
        Last prompt tokens kept; 64 published. None: 64, but at most a quarter of the budget.
    tables : tuple of (int, int) or None, default=None
        (K, L) instead of tuned ones; (10, 150) published.
    seed : int, default=0
        Of the projections.

    Raises
    ------
    ConfigError
        If a value is out of range.

    Notes
    -----
    Published with layers 0 and 16 dense.
    """

    budget: int
    sink: int = 4
    local: int | None = None
    tables: tuple[int, int] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.local is None:
            object.__setattr__(self, "local", min(64, self.budget // 4))
        if self.sink < 0 or self._n_local < 0 or self._sampled < 1:
            msg = f"budget must be larger than sink + local = {self.sink + self._n_local}, got {self.budget!r}"
            raise ConfigError(msg)
        if self.tables is not None and not (1 <= self.tables[0] <= 14 and 2 <= self.tables[1] <= 1000):
            msg = f"tables must be (K, L) with K in 1..=14 and L in 2..=1000, got {self.tables!r}"
            raise ConfigError(msg)

    @property
    def name(self) -> str:
        """``magicpig``."""
        return "magicpig"

    @property
    def needs(self) -> Needs:
        """Queries to tune K and L with."""
        return Needs(last_queries=32 if self.tables is None else 0)

    @property
    def generated_kept(self) -> str:
        """All."""
        return "all"

    @property
    def _n_local(self) -> int:
        assert self.local is not None
        return self.local

    @property
    def _sampled(self) -> int:
        return self.budget - self.sink - self._n_local

    def prepare(self, prompt: Prompt) -> dict[str, torch.Tensor]:
        """Hash the prompt.

        ``mean``: (B, H, 1, D). ``planes``: (B, L, K, D), the same for all rows. ``codes``: int16 (B, H, T, L).
        """
        live = prompt.valid[:, None, :, None]
        keys = prompt.keys.float()
        mean = keys.masked_fill(~live, 0.0).sum(2, keepdim=True) / prompt.lengths.view(-1, 1, 1, 1)
        centred = keys - mean
        n_bits, n_tables = self.tables or self._tuned(prompt, centred)
        generator = torch.Generator().manual_seed(self.seed)
        planes = torch.randn(n_tables, n_bits, keys.shape[-1], generator=generator).to(keys.device)
        codes = torch.cat(
            [_codes(centred, planes[i : i + _TABLES_AT_ONCE]) for i in range(0, n_tables, _TABLES_AT_ONCE)], -1
        )
        return {"mean": mean, "planes": planes.expand(keys.shape[0], -1, -1, -1), "codes": codes}

    def describe(self, state: dict[str, torch.Tensor]) -> dict[str, float]:
        """K and L of a layer."""
        return {"K": float(state["planes"].shape[2]), "L": float(state["planes"].shape[1])}

    def choose(self, view: StepView) -> Chosen:
        """Attend to what collides, to the ends of the prompt, and to everything generated."""
        planes, codes = view.state["planes"], view.state["codes"]
        n_tables, n_bits = planes.shape[1:3]
        own = _codes(view.query, planes[0])  # (B, H, G, L)
        n_columns = view.keys.shape[2]
        known = min(codes.shape[2], n_columns)
        # One query head at a time: the comparisons of all of them at once would not fit.
        hits = torch.stack(
            [(codes[:, :, :known] == own[:, :, g, None]).sum(-1, dtype=torch.int16) >= 2 for g in range(own.shape[2])],
            2,
        )
        hits = torch.nn.functional.pad(hits, (0, n_columns - known))
        local = view.columns >= view.n_prompt[:, None] - self._n_local  # generated tokens included
        exact = ((view.columns < self.sink) | local) & view.valid
        sampled = hits & ~exact[:, None, None] & view.valid[:, None, None]
        p = _chance(view.query, view.keys.float() - view.state["mean"])
        bias = torch.where(sampled, -torch.log(_sampled_with(p, n_bits, n_tables) + 1e-4), 0.0)
        return Chosen(exact[:, None, None] | sampled, bias=bias)

    def _tuned(self, prompt: Prompt, centred: torch.Tensor) -> tuple[int, int]:
        """K and L for which the last queries would sample the wanted number of tokens on average."""
        assert prompt.queries is not None
        assert prompt.queries_valid is not None
        queries, live = prompt.queries[:, :, :, -32:], prompt.queries_valid[:, -32:]
        far = (prompt.columns >= self.sink) & (prompt.columns < prompt.lengths[:, None] - self._n_local)
        chances = [_chance(queries[:, :, :, i], centred) for i in range(0, queries.shape[3], 8)]
        weights = [far[:, None, None] & live[:, i, None, None, None] for i in range(0, queries.shape[3], 8)]
        n_queries = max(1, sum(int(live[:, i].sum()) for i in range(0, queries.shape[3], 8)))
        n_queries *= queries.shape[1] * queries.shape[2]

        def expected(n_bits: int, n_tables: int) -> float:
            pairs = zip(chances, weights, strict=True)
            return sum(float((_sampled_with(p, n_bits, n_tables) * w).sum()) for p, w in pairs) / n_queries

        for n_bits in _BITS:
            low, high = _FEWEST_TABLES, _MOST_TABLES
            if not expected(n_bits, low) <= self._sampled <= expected(n_bits, high):
                continue
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if expected(n_bits, middle) <= self._sampled else (low, middle)
            return n_bits, low
        # Out of reach: as many as there are, or as few as there can be.
        few = expected(max(_BITS), _FEWEST_TABLES) > self._sampled
        return (max(_BITS), _FEWEST_TABLES) if few else (min(_BITS), _MOST_TABLES)


def _codes(vectors: torch.Tensor, planes: torch.Tensor) -> torch.Tensor:
    """Hashes of vectors (..., D) in the tables of planes (L, K, D): int16 (..., L)."""
    n_tables, n_bits, dim = planes.shape
    signs = (vectors @ planes.reshape(-1, dim).T > 0).view(*vectors.shape[:-1], n_tables, n_bits)
    powers = torch.tensor([1 << i for i in range(n_bits)], device=planes.device, dtype=torch.int16)
    return (signs * powers).sum(-1, dtype=torch.int16)


def _chance(query: torch.Tensor, centred: torch.Tensor) -> torch.Tensor:
    """Chance (B, H, G, T) that one random plane does not separate query (B, H, G, D) and key (B, H, T, D)."""
    lengths = query.norm(dim=-1)[..., None] * centred.norm(dim=-1)[:, :, None]
    cosine = (query @ centred.transpose(-1, -2) / lengths.clamp(min=1e-20)).clamp(-1.0, 1.0)
    return 1 - torch.acos(cosine) / math.pi


def _sampled_with(chance: torch.Tensor, n_bits: int, n_tables: int) -> torch.Tensor:
    """Chance of a collision in at least two tables."""
    p = chance.double() ** n_bits  # the difference below loses the small ones in float32
    return (1 - (1 - p) ** (n_tables - 1) * (1 - p + n_tables * p)).float()
