"""What one attention step kept of the truth: mass, output, top tokens, and where the rest was lost.

Dimension key: H KV heads, G query heads a KV head, n tokens, D head dim, V value dim.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
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


def measure(step: HeadStep) -> list[Measured]:
    """Compare with exact attention over all tokens.

    Parameters
    ----------
    step : HeadStep
        What was attended.

    Returns
    -------
    list of Measured
        One a KV head.
    """
    logits = torch.einsum("hgd,hnd->hgn", step.query.float(), step.keys.float()).double() * step.scaling
    if step.softcap is not None:
        logits = step.softcap * torch.tanh(logits / step.softcap)
    weights = torch.softmax(logits, -1)
    exact = torch.einsum("hgn,hnv->hgv", weights, step.values.double())
    mass = (weights * step.attended).sum(-1)
    error = (step.out.double() - exact).norm(dim=-1) / exact.norm(dim=-1).clamp_min(1e-30)
    recalls = [_recall(logits, step.attended, k) for k in RECALLS]
    n_attended = step.attended.sum(-1)
    best = weights.sort(-1, descending=True).values.cumsum(-1)
    regret = best.gather(-1, (n_attended - 1).clamp_min(0)[..., None])[..., 0] - mass
    measured = []
    for h in range(weights.shape[0]):
        packing, search = math.nan, math.nan
        if step.page is not None:
            packing, search = page_regret(weights[h], step.attended[h], step.page[h])
        measured.append(
            Measured(
                mass=float(mass[h].mean()),
                error=float(error[h].mean()),
                recall_16=float(recalls[0][h].mean()),
                recall_64=float(recalls[1][h].mean()),
                regret=float(regret[h].mean()),
                packing=packing,
                search=search,
                attended=float(n_attended[h].double().mean()),
            )
        )
    return measured


def _recall(logits: Tensor, attended: Tensor, k: int) -> Tensor:
    top = logits.topk(min(k, logits.shape[-1]), -1).indices
    return attended.gather(-1, top).double().mean(-1)


def page_regret(weights: Tensor, attended: Tensor, page: Tensor) -> tuple[float, float]:
    """Split what a choice of pages missed into packing and search.

    Tokens outside of pages (sink, window) are the same in all choices and do not count.

    Parameters
    ----------
    weights : torch.Tensor
        float64 `(G, n)`: the true softmax.
    attended : torch.Tensor
        bool `(G, n)`.
    page : torch.Tensor
        int64 `(n,)`: -1 outside of pages.

    Returns
    -------
    packing, search : float
        Mean over query heads; NaN if no pages, parts of pages, or other pages for other query heads were read.
    """
    paged = page >= 0
    if not bool(paged.any()):
        return math.nan, math.nan
    numbers = page[paged]
    n_pages = int(numbers.max()) + 1
    joint = weights.mean(0)[paged]
    read = attended[:, paged]
    by_page = torch.zeros(n_pages, dtype=joint.dtype, device=joint.device).index_add(0, numbers, joint)
    sizes = torch.bincount(numbers, minlength=n_pages)
    n_read = torch.bincount(numbers[read[0]], minlength=n_pages)
    chosen = n_read > 0
    if not bool(chosen.any()) or bool((read != read[0]).any()) or bool((n_read[chosen] != sizes[chosen]).any()):
        return math.nan, math.nan
    best_pages = by_page.topk(int(chosen.sum())).indices
    best_tokens = joint.topk(int(sizes[best_pages].sum())).values.sum()
    of_best_pages = by_page[best_pages].sum()
    return float(best_tokens - of_best_pages), float(of_best_pages - by_page[chosen].sum())


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
