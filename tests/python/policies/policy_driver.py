"""Drive a policy over random keys as a layer would, beside a reference that sees one row at a time, in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Protocol

import numpy as np
import torch
from icecache.attention import Notes, masked_attention, read_prompt
from icecache.pages import WholeKV
from icecache.select import Charges, MaskPolicy, StepView
from icecache.stats import Recorder

DIM, HEADS, SCALING = 16, 2, 0.31
LENGTHS = (150, 97, 31)


class Reference(Protocol):
    """One row: keys (H, n, D); says which tokens the newest query (H, G, D) attends to: bool (H, G, n).

    `bias` (H, G, n), if there is one, was added to the logits of the latest step.
    """

    def step(self, keys: np.ndarray, query: np.ndarray) -> np.ndarray: ...


@dataclass
class PromptRow:
    """What a reference may know of the prompt of one row; `queries` (H, G, n, D): one per prompt token."""

    keys: np.ndarray
    queries: np.ndarray
    n_layers: int = 4


@dataclass
class StepRow:
    """One step of one row, as the policy and as the reference see it."""

    got: np.ndarray
    expected: np.ndarray
    out: np.ndarray
    expected_out: np.ndarray


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def draw(rng: np.random.Generator, kind: str, shape: tuple[int, ...]) -> np.ndarray:
    """Gaussian, or like the keys of a model: a few common directions, norms with a heavy tail."""
    x = rng.standard_normal(shape)
    if kind == "gauss":
        return x
    topics = rng.standard_normal((5, shape[-1])) * 2
    return (topics[rng.integers(0, 5, shape[:-1])] + 0.5 * x) * rng.lognormal(0, 0.4, (*shape[:-1], 1))


def as_torch(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(x).float()


def drive(
    policy: MaskPolicy,
    reference: Callable[[PromptRow], Reference],
    *,
    group: int,
    kind: str = "gauss",
    lengths: tuple[int, ...] = LENGTHS,
    n_steps: int = 30,
    seed: int = 0,
    services: object | None = None,
) -> Iterator[StepRow]:
    """Prefill rows of different lengths (left padded), then decode; yields every row of every step."""
    rng = np.random.default_rng(seed)
    n_rows, longest, total = len(lengths), max(lengths), max(lengths) + n_steps
    keys, values = (draw(rng, kind, (n_rows, HEADS, total, DIM)) for _ in range(2))
    queries = draw(rng, kind, (n_rows, HEADS, group, total, DIM))
    valid = np.arange(longest) >= longest - np.array(lengths)[:, None]
    mask = torch.from_numpy(valid)
    whole = WholeKV.build(as_torch(keys[:, :, :longest]), as_torch(values[:, :, :longest]), mask)
    flat = as_torch(queries[:, :, :, :longest]).flatten(1, 2)
    notes = Notes().after(policy.needs, flat, as_torch(keys[:, :, :longest]), mask, SCALING, None)
    whole.state = policy.prepare(read_prompt(whole, notes, 2, 4, SCALING, None))
    whole.index = policy.prepare_index(whole.n_prompt)
    starts = [longest - n for n in lengths]
    rows = [reference(PromptRow(keys[b, :, s:longest], queries[b, :, :, s:longest])) for b, s in enumerate(starts)]
    services = services or stub_services()
    for t in range(longest, total):
        whole.append(as_torch(keys[:, :, t : t + 1]), as_torch(values[:, :, t : t + 1]), None)
        query = queries[:, :, :, t]
        view = StepView(
            2,
            4,
            as_torch(query),
            whole.keys,
            whole.device_lengths(),
            whole.device_prompt(),
            whole.state,
            whole.index,
            {},
            SCALING,
            None,
        )
        chosen = policy.choose(view)
        out = masked_attention(services, chosen, view, whole.values)
        whole.state = whole.state if chosen.state is None else dict(chosen.state)
        full = (chosen.mask & view.valid[:, None, None]).expand(view.logits.shape).numpy()
        for b, s in enumerate(starts):
            n = t + 1 - s
            expected = rows[b].step(keys[b, :, s : t + 1], query[b])
            logits = np.einsum("hgd,hnd->hgn", query[b], keys[b, :, s : t + 1]) * SCALING
            logits = logits + getattr(rows[b], "bias", 0.0)
            weights = softmax(np.where(expected, logits, -np.inf))
            assert not full[b, ..., n:].any()
            yield StepRow(
                full[b, ..., :n],
                np.broadcast_to(expected, logits.shape),
                out[b, 0].view(HEADS, group, DIM).numpy(),
                np.einsum("hgn,hnd->hgd", weights, values[b, :, s : t + 1]),
            )


def stub_services() -> SimpleNamespace:
    return SimpleNamespace(charges=Charges(), mass={}, recorder=Recorder())
