"""What a decode step on a device read, for the statistics."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from icecache.attention.device import DeviceStep, StepShape
from icecache.attention.mass import add_mass, kept_sum
from icecache.config import PAGE_TOKENS
from icecache.select import Services
from icecache.transfer import ADDRESS_BITS

MASS_EVERY = 8
"""Steps per estimate of the attention mass kept: it costs some launches."""
_LIVE = np.unpackbits(np.arange(1 << 16, dtype=np.uint16).view(np.uint8).reshape(-1, 2), axis=1).sum(1, dtype=np.int64)
"""Number of bits set, by the upper 16 bits of a page word."""


@dataclass(frozen=True, slots=True)
class Read:
    """What a step that is over has read; nothing of it changes any more.

    Parameters
    ----------
    words : numpy.ndarray
        uint64 (S, R, H, K): pages that each search chose.
    lse : numpy.ndarray
        float32 (S, R, H, G, 2): log-sum-exp over all pages, and over those.
    near_counts : tuple of int
        Near tokens of each row.
    attended : torch.Tensor or None
        (S, R, H, G), on the device: log-sum-exp over everything attended or estimated. None: the mass of this step is
        not estimated.
    """

    shape: StepShape
    words: npt.NDArray[np.uint64]
    lse: npt.NDArray[np.float32]
    near_counts: tuple[int, ...]
    attended: torch.Tensor | None

    def tokens(self) -> npt.NDArray[np.int64]:
        """Tokens of the pages, (S, R, H)."""
        live: npt.NDArray[np.int64] = _LIVE[self.words >> np.uint64(ADDRESS_BITS)].sum(-1)
        return live


def read_of(step: DeviceStep, table: torch.Tensor, lse: torch.Tensor, n_before: int) -> Read:
    """Take down what a step has read before the next one starts.

    Parameters
    ----------
    table : torch.Tensor
        int64 (S, R, H, K) words, on the host.
    lse : torch.Tensor
        float32 (S, R, H, G, 2), on the host.
    n_before : int
        Steps counted before this one: only some estimate the attention mass.
    """
    # The search knows all the mass of the leaders' queries, and nothing of the others'.
    attended = [x for layer in step.shape.leaders if (x := step.lse[layer]) is not None]
    estimates = n_before % MASS_EVERY == 0 and attended
    words = table.numpy().view(np.uint64).copy()
    masses = torch.stack(attended) if estimates else None
    return Read(step.shape, words, lse.numpy().copy(), tuple(step.near_counts), masses)


def count_read(services: Services, read: Read) -> None:
    """Add a step to the statistics. Some .2 ms of numbers and launches: best while the device computes the next one."""
    recorder, shape = services.recorder, read.shape
    sizes = np.array(shape.group_sizes)  # every layer of a group reads its own keys and values of the pages
    n_pages = int(np.count_nonzero(read.words, axis=(1, 2, 3)) @ sizes)
    recorder.pages_read += n_pages
    recorder.bytes_to_device += n_pages * PAGE_TOKENS * (shape.key_dim + shape.value_dim) * shape.dtype.itemsize
    recorder.attended(read.tokens().repeat(sizes, axis=0) + np.array(read.near_counts)[:, None])
    if read.attended is not None:
        add_mass(
            services, shape.device, kept_sum(read.attended, read.lse, with_rest=shape.estimates), read.attended.numel()
        )
