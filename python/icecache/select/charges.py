"""What masks cost, summed on the device: nobody waits for it until somebody asks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Charged:
    """Totals over layers, rows and steps, in tokens.

    Parameters
    ----------
    attended_sum, n_queries : int
        Tokens attended, and how many (query head, row, layer, step) attended them.
    attended_min, attended_max : int
        The extremes per query head.
    loaded_sum, n_heads : int
        The same per KV head: the union over its query group.
    generated_sum : int
        Attended tokens that came after the dense prefill.
    """

    attended_sum: int = 0
    n_queries: int = 0
    attended_min: int = 0
    attended_max: int = 0
    loaded_sum: int = 0
    n_heads: int = 0
    generated_sum: int = 0


class Charges:
    """Counters of one runtime, one set per device."""

    def __init__(self) -> None:
        self._sums: dict[torch.device, torch.Tensor] = {}
        self._extremes: dict[torch.device, torch.Tensor] = {}
        self._n_queries = self._n_heads = 0
        self._described: dict[str, list[float]] = {}

    def add(self, mask: torch.Tensor, generated: torch.Tensor) -> None:
        """Count one step of one layer.

        Parameters
        ----------
        mask : torch.Tensor
            Bool (B, H, G, T): attended.
        generated : torch.Tensor
            Bool (B, T): tokens that came after the dense prefill.
        """
        attended = mask.sum(-1)
        loaded = mask.any(2).sum()
        new = torch.stack([attended.sum(), loaded, (mask & generated[:, None, None]).sum()])
        low, high = torch.aminmax(attended)
        extremes = torch.stack([-low, high])
        held = self._sums.get(mask.device)
        self._sums[mask.device] = new if held is None else held + new
        held = self._extremes.get(mask.device)
        self._extremes[mask.device] = extremes if held is None else torch.maximum(held, extremes)
        self._n_queries += attended.numel()
        self._n_heads += attended.shape[0] * attended.shape[1]

    def note(self, described: Mapping[str, float]) -> None:
        """Take down numbers of one layer."""
        for name, value in described.items():
            self._described.setdefault(name, []).append(value)

    def described(self) -> dict[str, float]:
        """Means of what was noted."""
        return {name: sum(values) / len(values) for name, values in self._described.items()}

    def totals(self) -> Charged:
        """Read the counters; waits for the device."""
        if not self._sums:
            return Charged()
        sums = [held.tolist() for held in self._sums.values()]
        extremes = [held.tolist() for held in self._extremes.values()]
        return Charged(
            attended_sum=sum(s[0] for s in sums),
            n_queries=self._n_queries,
            attended_min=-max(e[0] for e in extremes),
            attended_max=max(e[1] for e in extremes),
            loaded_sum=sum(s[1] for s in sums),
            n_heads=self._n_heads,
            generated_sum=sum(s[2] for s in sums),
        )
