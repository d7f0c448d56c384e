"""What one attention step kept of the truth: mass, output, top tokens, and where the rest was lost.

Dimension key: H KV heads, G query heads a KV head, n tokens, D head dim, V value dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from statistics import fmean
from typing import Final

import torch
from torch import Tensor

RECALLS: Final = (16, 64)


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadStep:
    """A step of one layer and row, and what was attended in it.

    Parameters
    ----------
    query : torch.Tensor
        `(H, G, D)`, as attention got it (behind RoPE).
    keys, values : torch.Tensor
        `(H, n, D)`, `(H, n, V)`: every token, the newest one included.
    out : torch.Tensor
        `(H, G, V)`: what the policy's attention gave.
    attended : torch.Tensor
        bool `(H, G, n)`.
    page : torch.Tensor or None
        int64 `(H, n)`: page of each token in the index, -1 for tokens outside of pages; None: there are none.
    scaling : float
        Of the logits.
    softcap : float or None
        Logits are `softcap * tanh(logits / softcap)`.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    out: Tensor
    attended: Tensor
    page: Tensor | None
    scaling: float
    softcap: float | None


@dataclass(frozen=True, slots=True)
class Measured:
    """Of one KV head, means over its query heads.

    Parameters
    ----------
    mass : float
        Share of the true softmax that the attended tokens hold.
    error : float
        Length of the output's error as a share of the exact output's length.
    recall_16, recall_64 : float
        Share of the 16 and 64 tokens with the largest logits (all tokens, if there are fewer) that were attended.
    regret : float
        Mass of the best tokens of each query head minus that of as many attended ones.
    packing : float
        Mass of the best tokens minus that of the best pages, which hold as many; NaN if no whole pages were chosen.
    search : float
        Mass of the best pages minus that of the chosen ones, which are as many; NaN likewise.
    attended : float
        Tokens.
    """

    mass: float
    error: float
    recall_16: float
    recall_64: float
    regret: float
    packing: float
    search: float
    attended: float


def measure(step: HeadStep) -> Tensor:
    """Compare with exact attention over all tokens. Nothing waits for the device.

    Parameters
    ----------
    step : HeadStep
        What was attended.

    Returns
    -------
    torch.Tensor
        float64 `(H, len(MEASURES))`: the fields of `Measured`, in their order.
    """
    logits = torch.einsum("hgd,hnd->hgn", step.query.float(), step.keys.float()).double() * step.scaling
    if step.softcap is not None:
        logits = step.softcap * torch.tanh(logits / step.softcap)
    weights = torch.softmax(logits, -1)
    exact = torch.einsum("hgn,hnv->hgv", weights, step.values.double())
    mass = (weights * step.attended).sum(-1)
    error = (step.out.double() - exact).norm(dim=-1) / exact.norm(dim=-1).clamp_min(1e-30)
    top = logits.topk(min(max(RECALLS), logits.shape[-1]), -1).indices
    hit = step.attended.gather(-1, top).double()
    recalls = [hit[..., :k].mean(-1) for k in RECALLS]
    n_attended = step.attended.sum(-1)
    best = weights.sort(-1, descending=True).values.cumsum(-1)
    regret = best.gather(-1, (n_attended - 1).clamp_min(0)[..., None])[..., 0] - mass
    packing = search = torch.full_like(mass[:, 0], math.nan)
    if step.page is not None:
        packing, search = page_regret(weights, step.attended, step.page)
    means = [x.mean(-1) for x in (mass, error, *recalls, regret)]
    return torch.stack([*means, packing, search, n_attended.double().mean(-1)], -1)


def page_regret(weights: Tensor, attended: Tensor, page: Tensor) -> tuple[Tensor, Tensor]:
    """Split what a choice of pages missed into packing and search.

    Tokens outside of pages (sink, window) are the same in all choices and do not count.

    Parameters
    ----------
    weights : torch.Tensor
        float64 `(H, G, n)`: the true softmax.
    attended : torch.Tensor
        bool `(H, G, n)`.
    page : torch.Tensor
        int64 `(H, n)`: below n; -1 outside of pages.

    Returns
    -------
    packing, search : torch.Tensor
        float64 `(H,)`, means over query heads; NaN if no pages, parts of pages, or other pages for other query heads
        were read.
    """
    paged, of_page = page >= 0, page.clamp_min(0)
    read = attended & paged[:, None]
    joint = weights.mean(1) * paged
    by_page, sizes, n_read = (
        torch.zeros_like(joint).scatter_add(1, of_page, x.to(joint.dtype)) for x in (joint, paged, read[:, 0])
    )
    chosen = n_read > 0
    alike = (read == read[:, :1]).all(-1).all(-1) & (~chosen | (n_read == sizes)).all(-1) & chosen.any(-1)
    n_chosen = chosen.sum(-1, keepdim=True)
    best = by_page.argsort(-1, descending=True)
    of_best_pages = _first(by_page.gather(-1, best), n_chosen)
    n_tokens = _first(sizes.gather(-1, best), n_chosen).long()[:, None]
    best_tokens = _first(joint.sort(-1, descending=True).values, n_tokens)
    packing, search = best_tokens - of_best_pages, of_best_pages - (by_page * chosen).sum(-1)
    return torch.where(alike, packing, math.nan), torch.where(alike, search, math.nan)


def _first(values: Tensor, count: Tensor) -> Tensor:
    """Sum of the first `count` `(H, 1)` values of each row."""
    return values.cumsum(-1).gather(-1, (count - 1).clamp_min(0))[:, 0]


MEASURES: Final = tuple(field.name for field in fields(Measured))


@dataclass(frozen=True, slots=True)
class HeadRow:
    """A KV head under an arm, means over steps and samples.

    Parameters
    ----------
    arm : str
        "policy@budget".
    layer, head : int
        Which.
    steps : int
        How many were measured.
    means : dict of str to float or None
        By the names of :class:`Measured`; None where there is none.
    mass_p5, error_p95 : float
        5th percentile of the mass and 95th of the error over the steps.
    calibration : float or None
        Of the layer, see `LayerStep`.
    """

    arm: str
    layer: int
    head: int
    steps: int
    means: dict[str, float | None]
    mass_p5: float
    error_p95: float
    calibration: float | None


def known_mean(values: Iterable[float | None]) -> float | None:
    """Mean of those that are numbers; None: there are none."""
    numbers = [value for value in values if value is not None and not math.isnan(value)]
    return fmean(numbers) if numbers else None
