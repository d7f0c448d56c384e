"""The estimated share of the softmax that was attended, one number per (row, query head), summed up on the device.

``kept = exp(attended) / (exp(attended) + exp(all) - exp(chosen))``, all three log-sum-exps: what is not attended is
what the pages hold beside the chosen ones.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from icecache.select import Services


def kept_sum(attended: torch.Tensor, lse: npt.NDArray[np.float32], *, with_rest: bool = False) -> torch.Tensor:
    """Sum of the shares.

    Parameters
    ----------
    attended : torch.Tensor
        float32 (...): log-sum-exp over everything attended.
    lse : numpy.ndarray
        float32 (..., 2): log-sum-exp over all pages (estimate), and over the chosen ones.
    with_rest : bool, default=False
        Whether `attended` counts the pages that are not chosen, too.
    """
    rest = unread_lse(lse).to(attended.device)
    if with_rest:
        return (1.0 - torch.exp((rest - attended).clamp(max=0.0))).sum()
    return torch.sigmoid(attended - rest).sum()


def unread_lse(lse: npt.NDArray[np.float32]) -> torch.Tensor:
    """Log-sum-exp of the pages that are not chosen, float32 (...) on the CPU; minus infinity where there are none.

    Parameters
    ----------
    lse : numpy.ndarray
        float32 (..., 2): log-sum-exp over all pages (estimate), and over the chosen ones.
    """
    total, chosen = lse[..., 0].astype(np.float64), lse[..., 1].astype(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        rest = total + np.log1p(-np.exp(np.minimum(chosen - total, 0.0)))
    return torch.from_numpy(np.where(np.isnan(rest), -np.inf, rest).astype(np.float32))


def add_mass(services: Services, device: torch.device, kept: torch.Tensor | float, n: int) -> None:
    """Count the shares of `n` query heads, whose sum is `kept`; nobody waits for the device."""
    services.recorder.mass_n += n
    held = services.mass.get(device)
    if held is None:
        held = torch.zeros((), dtype=torch.float64, device=device)
    services.mass[device] = held + kept
