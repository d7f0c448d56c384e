"""Independent float64 oracle: what a decode step under a budget must give, from the trace of what was read."""

from __future__ import annotations

import numpy as np
import torch
from icecache.stats import TraceEvent


def attended_positions(event: TraceEvent, row: int, head: int) -> np.ndarray:
    """Positions a KV head attended, sink, pages and window; each must occur once."""
    if event.attended is not None:
        shared = event.attended[row, head]
        assert (shared == shared[0]).all(), "the query heads of this KV head attended to different tokens"
        return np.flatnonzero(shared[0])
    far = event.positions[row, head].ravel()
    near = [*range(event.sink_tokens[row]), *range(event.window_start[row], event.lengths[row])]
    positions = np.concatenate([near, far[far >= 0]]).astype(int)
    assert len(set(positions.tolist())) == len(positions)
    return np.sort(positions)


def attention(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float) -> torch.Tensor:
    """Softmax attention of one query [D] over keys [n, D] and values [n, Dv] in float64."""
    weights = torch.softmax(keys.double() @ query.double() * scaling, 0)
    return weights @ values.double()


def best_pages(query: torch.Tensor, keys: torch.Tensor, first: int, last: int, scaling: float, k: int) -> set[int]:
    """The k positional pages of tokens first .. last with the largest softmax mass summed over the group [G, D]."""
    logits = query.double() @ keys[first:last].double().T * scaling
    mass = torch.softmax(logits, -1).sum(0)
    pages = [float(mass[i : i + 16].sum()) for i in range(0, last - first, 16)]
    return set(np.argsort(pages)[::-1][:k].tolist())
