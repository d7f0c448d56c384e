"""Synthetic keys of one KV head after RoPE, and the queries of its group.

The generator imitates what the keys of real decoders look like: token types with Zipf frequencies, documents made of
segments with recurring topics, a slow drift, a power-law spectrum whose content sits in the slowly rotating RoPE pairs,
a few outlier channels with a shared mean, and norms that depend on the type. Queries aim at random positions, topics or
types; the heads of one group share their target with probability 0.6; every query is rescaled so that its exact top 256
keys hold between 55 and 98 % of the softmax mass.

Its parameters were fitted to the page-recall figures published for real Qwen3-4B keys (layer 2 for ``llama``, layer 20
for ``qwen``; root-mean-square error .030 and .058 over six figures). It is synthetic all the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Kind = Literal["llama", "qwen", "gauss"]
Floats = NDArray[np.float32]

CONTENT_DIM = 48
N_TYPES = 3000
N_TOPICS = 40
MEAN_SEGMENT_TOKENS = 300
DRIFT_RHO = 0.95
TOP_TOKENS = 256
OUTLIER_BAND = 0.78  # the shared mean's outliers sit in the slowest 22 % of the RoPE pairs


@dataclass(frozen=True, slots=True, kw_only=True)
class _Shape:
    """Fitted weights of one kind of layer."""

    type_weight: float
    topic_weight: float
    drift_weight: float
    noise_weight: float
    previous_token: float
    query_noise: float
    key_noise: float
    query_key_noise: float
    spectrum_decay: float
    mean_weight: float
    slow_floor: float
    slow_power: float
    type_norm_spread: float
    theta: float
    normalised: bool


_SHAPES = {
    "llama": _Shape(
        type_weight=0.635, topic_weight=0.583, drift_weight=0.28, noise_weight=0.397, previous_token=0.1,
        query_noise=0.353, key_noise=0.071, query_key_noise=0.118, spectrum_decay=0.403, mean_weight=0.405,
        slow_floor=0.12, slow_power=2.41, type_norm_spread=0.122, theta=5e5, normalised=False,
    ),
    "qwen": _Shape(
        type_weight=0.779, topic_weight=0.93, drift_weight=0.843, noise_weight=0.304, previous_token=0.4,
        query_noise=0.341, key_noise=0.17, query_key_noise=0.187, spectrum_decay=0.492, mean_weight=0.922,
        slow_floor=0.243, slow_power=1.808, type_norm_spread=0.03, theta=1e6, normalised=True,
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Context:
    """What the tokens are about: the latent content of each, and the vectors it was mixed from."""

    content: Floats  # [n, CONTENT_DIM]
    types: NDArray[np.int64]  # [n]
    topics: NDArray[np.int64]  # [n]
    type_vectors: Floats  # [N_TYPES, CONTENT_DIM]
    topic_vectors: Floats  # [N_TOPICS, CONTENT_DIM]


def attention_keys(
    kind: Kind, n_tokens: int, *, n_queries: int = 64, group: int = 4, head_dim: int = 128, seed: int = 0
) -> tuple[Floats, Floats]:
    """Draw the keys of one KV head and the queries of its group.

    Parameters
    ----------
    kind : {"llama", "qwen", "gauss"}
        ``llama``: norms vary, RoPE base 5e5. ``qwen``: keys normalised before RoPE, base 1e6. ``gauss``: independent
        normal keys and queries, no structure at all.
    n_tokens : int
        Number of keys.
    n_queries : int, default=64
        Number of steps; the queries stand at the positions right after the keys.
    group : int, default=4
        Query heads that share the KV head.
    head_dim : int, default=128
        Length of a key.
    seed : int, default=0
        Seed of the generator.

    Returns
    -------
    keys : NDArray[np.float32]
        ``(n_tokens, head_dim)``, post-RoPE.
    queries : NDArray[np.float32]
        ``(n_queries, group, head_dim)``, post-RoPE, to be used with logits ``q . k / sqrt(head_dim)``.
    """
    rng = np.random.default_rng(seed)
    if kind == "gauss":
        keys = rng.standard_normal((n_tokens, head_dim)).astype(np.float32)
        queries = rng.standard_normal((n_queries * group, head_dim)).astype(np.float32)
        return keys, _sharpen(queries, keys, rng).reshape(n_queries, group, head_dim)
    shape = _SHAPES[kind]
    spectrum = (np.arange(1, CONTENT_DIM + 1) ** -shape.spectrum_decay).astype(np.float32)
    context = _context(shape, n_tokens, spectrum, rng)
    basis, mean = _basis(shape, head_dim, rng)
    norms = np.exp(shape.type_norm_spread * rng.standard_normal(N_TYPES)).astype(np.float32)
    noise = rng.standard_normal((n_tokens, head_dim)).astype(np.float32)
    keys = mean + context.content @ basis + shape.key_noise * noise
    if shape.normalised:
        gain = np.exp(0.25 * rng.standard_normal(head_dim)).astype(np.float32)
        keys = keys / np.sqrt((keys**2).mean(1, keepdims=True)) * gain
    keys = _rope(keys * norms[context.types][:, None], np.arange(n_tokens), shape.theta)

    targets = _targets(shape, (n_queries, group), context, spectrum, rng)
    noise = rng.standard_normal((n_queries * group, head_dim)).astype(np.float32)
    queries = 0.35 * mean + targets.reshape(-1, CONTENT_DIM) @ basis + shape.query_key_noise * noise
    if shape.normalised:
        queries = queries / np.sqrt((queries**2).mean(1, keepdims=True))
    queries = _rope(queries, np.repeat(n_tokens + np.arange(n_queries), group), shape.theta)
    keys, queries = np.ascontiguousarray(keys, np.float32), np.ascontiguousarray(queries, np.float32)
    return keys, _sharpen(queries, keys, rng).reshape(n_queries, group, head_dim)


def _context(shape: _Shape, n: int, spectrum: Floats, rng: np.random.Generator) -> _Context:
    """Draw the content of every token: type + topic + drift + noise, mixed with the previous token's."""
    type_vectors = rng.standard_normal((N_TYPES, CONTENT_DIM)).astype(np.float32) * spectrum
    topic_vectors = rng.standard_normal((N_TOPICS, CONTENT_DIM)).astype(np.float32) * spectrum
    frequency = np.arange(1, N_TYPES + 1) ** -1.05
    types = rng.choice(N_TYPES, n, p=frequency / frequency.sum())
    topics = np.zeros(n, np.int64)
    start = 0
    while start < n:
        stop = min(n, start + int(rng.geometric(1 / MEAN_SEGMENT_TOKENS)))
        topics[start:stop] = rng.integers(N_TOPICS)
        start = stop
    drift = np.zeros((n, CONTENT_DIM), np.float32)
    state = np.zeros(CONTENT_DIM, np.float32)
    steps = rng.standard_normal((n, CONTENT_DIM)).astype(np.float32) * spectrum
    for i in range(n):
        state = DRIFT_RHO * state + math.sqrt(1 - DRIFT_RHO**2) * steps[i]
        drift[i] = state
    noise = rng.standard_normal((n, CONTENT_DIM)).astype(np.float32) * spectrum
    content = (
        shape.type_weight * type_vectors[types]
        + shape.topic_weight * topic_vectors[topics]
        + shape.drift_weight * drift
        + shape.noise_weight * noise
    )
    mixed = content.copy()
    mixed[1:] += shape.previous_token * content[:-1]
    return _Context(mixed, types, topics, type_vectors, topic_vectors)


def _basis(shape: _Shape, d: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
    """Draw the map from content to key channels (mostly slow pairs), and the mean key with its outlier channels."""
    basis = np.linalg.qr(rng.standard_normal((CONTENT_DIM, d)).astype(np.float32).T)[0].T
    pair = np.concatenate([np.arange(d // 2)] * 2) / (d / 2 - 1)
    weight = shape.slow_floor + (1 - shape.slow_floor) * pair**shape.slow_power
    basis = (basis * (weight / np.sqrt((weight**2).mean()))).astype(np.float32)
    mean = rng.standard_normal(d).astype(np.float32) * 0.25
    slow = np.arange(int(d / 2 * OUTLIER_BAND), d // 2)
    outliers = np.concatenate([rng.choice(slow, 3, replace=False), d // 2 + rng.choice(slow, 2, replace=False)])
    mean[outliers] = rng.choice([-1, 1], len(outliers)) * rng.uniform(3.0, 6.0, len(outliers)) * shape.mean_weight
    return basis, mean


def _targets(
    shape: _Shape, size: tuple[int, int], context: _Context, spectrum: Floats, rng: np.random.Generator
) -> Floats:
    """Draw what each query seeks: 1-3 positions (45 %), a topic (25 %), a token type (20 %) or nothing much (10 %)."""
    n = len(context.content)
    out = np.zeros((*size, CONTENT_DIM), np.float32)
    for step in range(size[0]):
        shared: Floats | None = None
        for head in range(size[1]):
            if shared is None or rng.random() > 0.6:
                draw = rng.random()
                if draw < 0.45:
                    target = context.content[rng.integers(0, n, rng.integers(1, 4))].mean(0)
                elif draw < 0.70:
                    target = 1.6 * context.topic_vectors[context.topics[rng.integers(n)]]
                elif draw < 0.90:
                    target = 1.6 * context.type_vectors[context.types[rng.integers(n)]]
                else:
                    target = 0.7 * rng.standard_normal(CONTENT_DIM).astype(np.float32) * spectrum
                shared = target if shared is None else shared
            else:
                target = shared
            noise = rng.standard_normal(CONTENT_DIM).astype(np.float32)
            out[step, head] = target + shape.query_noise * noise * spectrum
    return out


def _rope(x: Floats, positions: NDArray[np.int64], theta: float) -> Floats:
    """Rotary embedding, halves split as in Llama; ``x`` is ``(n, d)``."""
    d = x.shape[1]
    angle = positions.astype(np.float64)[:, None] * theta ** (-np.arange(0, d, 2) / d)[None, :]
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    first, second = x[:, : d // 2], x[:, d // 2 :]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], 1)


def _sharpen(queries: Floats, keys: Floats, rng: np.random.Generator) -> Floats:
    """Rescale each query so that its exact top 256 keys hold a mass drawn from U(.55, .98)."""
    logits = (queries @ keys.T) / math.sqrt(queries.shape[1])
    logits.sort(1)
    goals = rng.uniform(0.55, 0.98, len(queries))
    out: Floats = queries.copy()
    for i, row in enumerate(logits.astype(np.float64)):
        low, high = 1e-3, 1e3
        for _ in range(40):
            factor = math.sqrt(low * high)
            weight = np.exp(factor * (row - row[-1]))
            if weight[-TOP_TOKENS:].sum() / weight.sum() < goals[i]:
                low = factor
            else:
                high = factor
        out[i] *= np.float32(math.sqrt(low * high))
    return out
