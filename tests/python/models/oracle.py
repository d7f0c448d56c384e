"""Independent float64 oracle: what a decode step under a budget must give, from the trace of what was read."""

from __future__ import annotations

import numpy as np
import torch
from icecache.hf import attention as seam
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


def watch(runtime, monkeypatch):
    """Everything the layers see and give in decode steps: (layer, query, keys, values) and outputs, plus the trace."""
    calls, events = [], []
    inner = seam.RetrievalLayer.attend

    def attend(layer, call):
        out = inner(layer, call)
        calls.append((layer.layer_idx, call, out))
        return out

    monkeypatch.setattr(seam.RetrievalLayer, "attend", attend)
    runtime.trace = events.append
    return calls, events


def history(calls, layer, row, pads):
    """All keys and values of one row of one layer after each step, padding dropped."""
    keys = torch.cat([call.keys[row] for i, call, _ in calls if i == layer], 1)[:, pads:]
    values = torch.cat([call.values[row] for i, call, _ in calls if i == layer], 1)[:, pads:]
    return keys, values


def check_decode_outputs(calls, events, layers, lengths, n_steps, chosen_by=None):
    """Compare outputs of decode steps with attention over exactly the tokens that the trace says were read.

    `chosen_by[layer]` names the layer whose events say what a layer had to read; default: its own.
    """
    decode = [(layer, call, out) for layer, call, out in calls if call.query.shape[2] == 1]
    for layer in layers:
        outputs = [(call, out) for i, call, out in decode if i == layer]
        leader = layer if chosen_by is None else chosen_by[layer]
        group = outputs[0][0].query.shape[1] // outputs[0][0].keys.shape[1]
        for row, length in enumerate(lengths):
            keys, values = history(calls, layer, row, max(lengths) - length)
            of_row = [(e, e.rows.index(row)) for e in events if e.layer == leader and row in e.rows]
            assert len(of_row) == len(outputs) == n_steps
            for (call, out), (event, at) in zip(outputs, of_row, strict=True):
                n = event.lengths[at]
                for q in range(call.query.shape[1]):
                    head = q // group
                    read = attended_positions(event, at, head)
                    assert read.max() == n - 1
                    truth = attention(call.query[row, q, 0], keys[head, read], values[head, read], call.scaling)
                    error = (out[row, 0, q].double() - truth).abs().max()
                    assert error <= 1e-5 * max(1.0, float(truth.abs().max()))
