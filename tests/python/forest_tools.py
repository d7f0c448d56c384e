"""Keys and oracles for the tests of `icecache._core`.

Dimension key: R rows (sequences), H KV heads, G query heads per KV head, N tokens, D head dim, K pages.
"""

from __future__ import annotations

import numpy as np
from icecache import _core

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def encode(values: np.ndarray, dtype: str) -> np.ndarray:
    """Float32 `[..., D]` as stored bytes `[..., D * itemsize]`, round to nearest (bfloat16: towards zero)."""
    values = np.ascontiguousarray(values, np.float32)
    if dtype == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
    return values.astype(dtype).view(np.uint8)


def decode(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Stored bytes as float32; exact."""
    raw = np.ascontiguousarray(raw)
    if dtype == "bfloat16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return raw.view(dtype).astype(np.float32)


def random_rows(seed: int, heads: int, n: int, dim: int, dtype: str, kind: str = "clustered") -> np.ndarray:
    """Bytes `[H, N, D * itemsize]` of one kind of keys."""
    rng = np.random.default_rng(seed)
    noise = rng.standard_normal((heads, n, dim), dtype=np.float32)
    if kind == "clustered":
        centers = rng.standard_normal((heads, 12, dim), dtype=np.float32) * 2
        noise = noise * 0.5 + centers[:, rng.integers(0, 12, n)]
    elif kind == "equal":
        noise = np.broadcast_to(noise[:, :1], noise.shape)
    elif kind == "zero":
        noise = np.zeros_like(noise)
    elif kind == "outlier" and n:
        noise = noise.copy()
        noise[:, rng.integers(n)] *= 100
    elif kind == "one-hot":
        noise = np.eye(dim, dtype=np.float32)[rng.integers(0, dim, (heads, n))]
    return encode(noise, dtype)


KINDS = ("clustered", "gauss", "equal", "zero", "outlier", "one-hot")


def make(rows: list[np.ndarray], dtype: str = "float32", dim: int = 32, pool: _core.Pool | None = None, **options: int):
    """A forest per element of `rows` (keys `[H, N, bytes]`; values are the keys reversed), and their store."""
    store = _core.PageStore(dim, dim, dtype, **options)
    forests = [_core.Forest(store, keys.shape[0]) for keys in rows]
    _core.extend(pool or _core.Pool(1), forests, rows, [flip(keys) for keys in rows])
    return store, forests


def flip(keys: np.ndarray) -> np.ndarray:
    """Values that tell which token they belong to: the bytes of the key, reversed."""
    return np.ascontiguousarray(keys[..., ::-1])


def read(forest: _core.Forest, start: int, stop: int, store: _core.PageStore) -> tuple[np.ndarray, np.ndarray]:
    """Keys and values of tokens `start..stop`, `[H, stop - start, bytes]`."""
    size = ITEM_BYTES[store.dtype]
    shape = (forest.n_kv_heads, stop - start)
    keys = np.full((*shape, store.key_dim * size), 0xAB, np.uint8)
    values = np.full((*shape, store.value_dim * size), 0xAB, np.uint8)
    forest.read(start, stop, keys, values)
    return keys, values


def gather(pool: _core.Pool, selection: _core.Selection, store: _core.PageStore) -> tuple[np.ndarray, np.ndarray, int]:
    """Keys and values `[R, H, K, 16, bytes]` of all selected pages, and the bytes copied."""
    size = ITEM_BYTES[store.dtype]
    shape = (*selection.pages.shape, 16)
    keys = np.full((*shape, store.key_dim * size), 0xAB, np.uint8)
    values = np.full((*shape, store.value_dim * size), 0xAB, np.uint8)
    copied = selection.gather(pool, 0, selection.pages.shape[2], keys, values)
    return keys, values, copied


def logits(keys: np.ndarray, queries: np.ndarray, dtype: str, scaling: float, softcap: float | None) -> np.ndarray:
    """Scaled logits in float64, `[H, G, N]` of keys `[H, N, bytes]` and queries `[H, G, D]`."""
    table = np.einsum("hgd,hnd->hgn", queries.astype(np.float64), decode(keys, dtype).astype(np.float64)) * scaling
    return softcap * np.tanh(table / softcap) if softcap else table


def logsumexp(table: np.ndarray, axis: int = -1) -> np.ndarray:
    """Natural log of the sum of exponentials; minus infinity over nothing."""
    if table.shape[axis] == 0:
        return np.full(np.delete(table.shape, axis), -np.inf)
    top = table.max(axis=axis, keepdims=True)
    top = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore"):
        return np.log(np.exp(table - top).sum(axis=axis)) + top.squeeze(axis)
