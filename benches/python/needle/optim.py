"""Muon for hidden matrices, AdamW for the rest, one learning-rate scale for both."""

from __future__ import annotations

import torch
from torch import Tensor, nn

MOMENTUM = 0.95
WEIGHT_DECAY = 0.01
# Quintic Newton-Schulz iteration of Muon (Jordan et al. 2024): pushes all singular values towards 1.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


def orthogonalise(matrices: Tensor) -> Tensor:
    """Nearest semi-orthogonal matrices, roughly; float `(n, rows, columns)` of any float type."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if tall else x


class Muon:
    """Orthogonalised momentum; matrices of one shape are orthogonalised as one batch.

    Parameters
    ----------
    weights : list of Parameter
        Two-dimensional.
    learning_rate : float
        At scale 1.
    """

    def __init__(self, weights: list[nn.Parameter], learning_rate: float) -> None:
        self.learning_rate = learning_rate
        self.groups: dict[tuple[int, ...], list[nn.Parameter]] = {}
        for weight in weights:
            self.groups.setdefault(tuple(weight.shape), []).append(weight)
        self.momenta = {
            shape: torch.zeros(len(group), *shape, device=group[0].device) for shape, group in self.groups.items()
        }

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """Update all weights from their gradients and clear these."""
        for shape, group in self.groups.items():
            gradient = torch.stack([weight.grad for weight in group if weight.grad is not None]).float()
            momentum = self.momenta[shape].lerp_(gradient, 1 - MOMENTUM)
            update = gradient.lerp(momentum, MOMENTUM)
            update = orthogonalise(update.bfloat16() if update.is_cuda else update).float()
            update *= max(1.0, shape[0] / shape[1]) ** 0.5
            rate = self.learning_rate * scale
            for weight, change in zip(group, update, strict=True):
                weight.mul_(1 - rate * WEIGHT_DECAY).add_(change, alpha=-rate)
                weight.grad = None


class Optimiser:
    """Both optimisers of a model.

    Parameters
    ----------
    model : Module
        Its two-dimensional weights but the embeddings go to Muon.
    muon_lr, adam_lr : float
        Learning rates at scale 1.
    """

    def __init__(self, model: nn.Module, muon_lr: float, adam_lr: float) -> None:
        hidden, self.rest = [], []
        for name, weight in model.named_parameters():
            is_hidden = weight.dim() == 2 and "embed" not in name
            (hidden if is_hidden else self.rest).append(weight)
        self.muon = Muon(hidden, muon_lr)
        self.adam_lr = adam_lr
        self.adam = torch.optim.AdamW(
            self.rest, lr=adam_lr, betas=(0.9, 0.95), weight_decay=0.0, fused=self.rest[0].is_cuda
        )

    def step(self, scale: float) -> None:
        """Update every weight from its gradient and clear the gradients."""
        for group in self.adam.param_groups:
            group["lr"] = self.adam_lr * scale
        torch.nn.utils.clip_grad_norm_(self.rest, 1.0)
        self.adam.step()
        self.adam.zero_grad(set_to_none=True)
        self.muon.step(scale)
