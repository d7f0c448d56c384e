"""The data sets: keys of an attention head (MIPS), a Gaussian mixture (L2), sentence embeddings (cosine).

Each is made from a seed, kept in a cache folder outside the repository as ``.npy`` files beside its exact neighbours,
and mapped into memory from there, so that it does not count as anonymous memory of the process that measures.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from icecache.bench.attention_keys import attention_keys

from ann import text
from ann.truth import Floats, Ids, Metric, exact

N_QUERIES = 1000
N_EXTRA = 4096  # vectors of the same kind kept back, for measuring insertions
_CENTRE_SPREAD = 3.0
_ROTATIONS = 8
_ARRAYS = ("base", "extra", "queries", "truth", "truth_scores")


@dataclass(frozen=True, slots=True, kw_only=True)
class Dataset:
    """Vectors, queries, and the exact neighbours of the queries.

    Attributes
    ----------
    base, extra, queries : float32 arrays, (n, d)
        What the index holds, what is inserted later, what is asked.
    truth, truth_scores : int64 and float32 arrays, (n_queries, 100)
        The exact neighbours within `base`, nearest first.
    about : str
        How it was made, seed included.
    digest : str
        First 16 hexadecimal digits of the SHA-256 of base and queries.
    """

    name: str
    metric: Metric
    base: Floats
    extra: Floats
    queries: Floats
    truth: Ids
    truth_scores: Floats
    about: str
    digest: str


@dataclass(frozen=True, slots=True)
class _Raw:
    """Vectors of a data set before the exact neighbours are known."""

    metric: Metric
    base: Floats
    extra: Floats
    queries: Floats
    about: str


def keys(n: int, seed: int = 0, n_queries: int = N_QUERIES, n_extra: int = N_EXTRA) -> _Raw:
    """Post-RoPE keys of one KV head in order of position; the queries are those of later steps: out of distribution."""
    group = 4
    rows, queries = attention_keys("llama", n + n_extra, n_queries=-(-n_queries // group), group=group, seed=seed)
    about = (
        f"attention_keys('llama', {n + n_extra}, n_queries={-(-n_queries // group)}, group={group}, seed={seed}): "
        f"the first {n} keys, the last {n_extra} kept back"
    )
    return _Raw("ip", rows[:n], rows[n:], queries.reshape(-1, rows.shape[1])[:n_queries], about)


def mixture(
    n: int,
    seed: int = 0,
    n_queries: int = N_QUERIES,
    n_extra: int = N_EXTRA,
    *,
    dim: int = 128,
    components: int = 1000,
) -> _Raw:
    """Gaussians with Zipf weights and different sizes, stretched along rotated axes; queries from the same mixture."""
    rng = np.random.default_rng(seed)
    axes = np.arange(1, dim + 1) ** -0.5
    weight = 1.0 / np.arange(1, components + 1)
    centres = rng.standard_normal((components, dim)) * axes * _CENTRE_SPREAD
    bases = [np.linalg.qr(rng.standard_normal((dim, dim)))[0] for _ in range(_ROTATIONS)]
    size = np.exp(0.3 * rng.standard_normal(components))
    owner = rng.choice(components, n + n_extra + n_queries, p=weight / weight.sum())
    rows = np.empty((len(owner), dim), np.float32)
    for number, basis in enumerate(bases):
        mine = np.flatnonzero(owner % _ROTATIONS == number)
        noise = (rng.standard_normal((len(mine), dim)) * axes) @ basis
        rows[mine] = centres[owner[mine]] + noise * size[owner[mine], None]
    about = (
        f"{components} Gaussians with weights 1/rank, d {dim}; centres N(0, 9/j) in channel j; within a component "
        f"N(0, s^2/j) along axes rotated in {_ROTATIONS} ways, log s ~ N(0, .09); seed {seed}"
    )
    return _Raw("l2", rows[:n], rows[n : n + n_extra], rows[n + n_extra :], about)


def _sentences(cache: Path) -> _Raw:
    rows, about = text.embed(32_768 + 2048 + N_QUERIES, cache)
    return _Raw("cosine", rows[:32_768], rows[32_768:-N_QUERIES], rows[-N_QUERIES:], about)


#: How each data set is made, from the cache folder (the embeddings keep their model there).
RECIPES: dict[str, Callable[[Path], _Raw]] = {
    "keys36k": lambda _: keys(36_864),
    "keys300k": lambda _: keys(307_200),
    "gmm200k": lambda _: mixture(200_000),
    "minilm32k": _sentences,
    # Seconds, not minutes: for trying the benchmark itself.
    "keys4k": lambda _: keys(4096, n_queries=200, n_extra=512),
    "gmm4k": lambda _: mixture(4096, n_queries=200, n_extra=512, components=50),
}


def load(name: str, cache: Path) -> Dataset:
    """Give a data set, making it first if the cache does not hold it.

    Raises
    ------
    ValueError
        If there is no data set of that name.
    """
    if name not in RECIPES:
        msg = f"data set: expected one of {sorted(RECIPES)}, got {name!r}"
        raise ValueError(msg)
    folder = cache / name
    if not (folder / "about.json").exists():
        store(name, RECIPES[name](cache), cache)
    about = json.loads((folder / "about.json").read_text())
    arrays = {part: np.load(folder / f"{part}.npy", mmap_mode="r") for part in _ARRAYS}
    return Dataset(name=name, **about, **arrays)


def store(name: str, raw: _Raw, cache: Path) -> None:
    """Add the exact neighbours and write everything; ``about.json`` comes last and marks the set as complete."""
    folder = cache / name
    folder.mkdir(parents=True, exist_ok=True)
    ids, best = exact(raw.queries, raw.base, raw.metric)
    arrays = dict(zip(_ARRAYS, (raw.base, raw.extra, raw.queries, ids, best), strict=True))
    for part, rows in arrays.items():
        np.save(folder / f"{part}.npy", np.ascontiguousarray(rows))
    digest = hashlib.sha256(raw.base.tobytes() + raw.queries.tobytes()).hexdigest()[:16]
    about = {"metric": raw.metric, "about": raw.about, "digest": digest}
    (folder / "about.json").write_text(json.dumps(about, indent=1))
