"""Random pages in slots, and their summaries, for tests of the search on a device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from icecache.kernels.page_codes import PageCodes, decoded, empty_codes, page_codes, rotation_matrix

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass
class Slots:
    """Pages of `units` trees with `n` slots each, some of them empty.

    Parameters
    ----------
    keys : torch.Tensor
        (U, N, 16, D), in the pages' dtype, on the CPU; dead slots hold NaN.
    live : torch.Tensor
        bool (U, N, 16).
    codes : PageCodes
        Written by the kernel.
    memory : torch.Tensor
        What the words name.
    """

    keys: torch.Tensor
    live: torch.Tensor
    codes: PageCodes
    memory: torch.Tensor
    rotation: torch.Tensor

    @property
    def words(self) -> torch.Tensor:
        """(U, N), on the CPU."""
        return self.codes.words.cpu().view(self.live.shape[:2])

    def decoded(self, *, fine: bool = True) -> torch.Tensor:
        """(U, N, 16, D) float32 on the CPU: rotated keys as summarised."""
        everything = torch.arange(self.codes.words.numel(), device=self.codes.words.device)
        return decoded(self.codes, everything, fine=fine).cpu().view(self.keys.shape)

    @property
    def distance(self) -> torch.Tensor:
        """(U, N) on the CPU."""
        return self.codes.numbers[2].cpu().view(self.live.shape[:2])


def make_slots(
    units: int, n: int, dim: int, dtype: torch.dtype = torch.float32, *, seed: int = 0, empty: float = 0.2
) -> Slots:
    """Pages around random means, with a channel that sticks out; a fifth of the slots is empty, a fifth not full.

    On a GPU the fine bits lie in host memory.
    """
    generator = torch.Generator().manual_seed(seed)
    mean = torch.randn(units, n, 1, dim, generator=generator)
    keys = mean + 0.7 * torch.randn(units, n, 16, dim, generator=generator)
    keys[..., 3] = 5 * keys[..., 3] + 9
    keys = keys.to(dtype)
    live = torch.ones(units, n, 16, dtype=torch.bool)
    live[torch.rand(units, n, generator=generator) < 0.2] = torch.rand(16, generator=generator) < 0.5
    live[..., 0] = True
    there = torch.rand(units, n, generator=generator) >= empty
    live &= there[..., None]
    keys = torch.where(live[..., None], keys, torch.nan)
    # Pages are keys, then values; an odd page in between shows that addresses are followed.
    memory = torch.full((units * n, 2, 16, dim), torch.nan, dtype=dtype)
    order = torch.randperm(units * n, generator=generator)
    memory[order, 0] = keys.flatten(0, 1)
    memory = memory.to(DEVICE)
    address = memory.data_ptr() + order * memory[0].numel() * memory.element_size()
    bits = (live.flatten(0, 1).long() << torch.arange(48, 64)).sum(1)
    words = torch.where(there.flatten(), address | bits, 0)
    fine = torch.zeros(units * n, dim, dtype=torch.int16, pin_memory=True) if DEVICE == "cuda" else None
    codes = empty_codes(units * n, dim, torch.device(DEVICE), fine)
    rotation = rotation_matrix(dim, torch.device(DEVICE))
    slots = torch.randperm(units * n, generator=generator)
    page_codes(codes, slots.to(DEVICE), words[slots].to(DEVICE), rotation, torch.zeros(1, dtype=dtype, device=DEVICE))
    return Slots(keys, live, codes, memory, rotation)
