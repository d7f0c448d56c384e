"""What a decode step on a device read, for the statistics."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from icecache.attention.device import DeviceStep
from icecache.attention.mass import add_mass, kept_sum
from icecache.config import PAGE_TOKENS
from icecache.select import Services
from icecache.transfer import ADDRESS_BITS

MASS_EVERY = 8
"""Steps per estimate of the attention mass kept: it costs some launches."""
_LIVE = np.unpackbits(np.arange(1 << 16, dtype=np.uint16).view(np.uint8).reshape(-1, 2), axis=1).sum(1, dtype=np.int64)
"""Number of bits set, by the upper 16 bits of a page word."""


def count_step(
    services: Services, step: DeviceStep, table: torch.Tensor, lse: torch.Tensor, n_before: int
) -> npt.NDArray[np.int64]:
    """Count a step that is over.

    Parameters
    ----------
    table : torch.Tensor
        int64 (S, R, H, K) words of the pages that each search chose, on the host.
    lse : torch.Tensor
        float32 (S, R, H, G, 2), on the host: log-sum-exp over all pages, and over those.
    n_before : int
        Steps counted before this one: only some estimate the attention mass.

    Returns
    -------
    numpy.ndarray
        (S, R, H): tokens of these pages.
    """
    recorder, shape = services.recorder, step.shape
    words = table.numpy().view(np.uint64)
    sizes = np.array(shape.group_sizes)  # every layer of a group reads its own keys and values of the pages
    n_pages = int(np.count_nonzero(words, axis=(1, 2, 3)) @ sizes)
    recorder.pages_read += n_pages
    recorder.bytes_to_device += n_pages * PAGE_TOKENS * (shape.key_dim + shape.value_dim) * shape.dtype.itemsize
    live: npt.NDArray[np.int64] = _LIVE[words >> np.uint64(ADDRESS_BITS)].sum(-1)
    recorder.attended(live.repeat(sizes, axis=0) + np.array(step.near_counts)[:, None])
    # The search knows all the mass of the leaders' queries, and nothing of the others'.
    attended = [x for layer in shape.leaders if (x := step.lse[layer]) is not None]
    if n_before % MASS_EVERY == 0 and attended:
        kept = kept_sum(torch.stack(attended), lse.numpy())
        add_mass(services, shape.device, kept, sum(x.numel() for x in attended))
    return live
