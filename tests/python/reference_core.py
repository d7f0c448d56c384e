"""Slow, obvious NumPy stand-in for ``icecache._core``: positional pages, exact scores.

Page ``p`` of every head holds tokens ``16 p .. 16 p + 15``. Nothing is clustered and nothing is estimated, so every
answer can be checked by hand. It is the oracle of the runtime's tests; production code never imports it.

Dimension key: R rows (sequences), H KV heads, G query heads per KV head, K pages, D head dim.
"""

from __future__ import annotations

import weakref

import numpy as np

PAGE = 16
_ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def decode(raw: np.ndarray, dtype: str) -> np.ndarray:
    """Values of uint8 views ``[..., D * itemsize]`` as float32 ``[..., D]``."""
    raw = np.ascontiguousarray(raw)
    if dtype == "bfloat16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return raw.view(dtype).astype(np.float32)


class Pool:
    def __init__(self, threads: int | None = None) -> None:
        self.threads = threads or 1


class PageStore:
    def __init__(
        self,
        key_dim: int,
        value_dim: int,
        dtype: str,
        *,
        limit_bytes: int | None = None,
        memory: object = None,  # noqa: ARG002
        value_means: bool = False,
    ) -> None:
        self.value_means = value_means
        self.key_dim, self.value_dim, self.dtype, self.limit_bytes = key_dim, value_dim, dtype, limit_bytes
        self.page_bytes = PAGE * (key_dim + value_dim) * _ITEM_BYTES[dtype]
        self.forests: weakref.WeakSet[Forest] = weakref.WeakSet()

    def used_bytes(self) -> int:
        return sum(sum(forest.n_pages()) for forest in self.forests) * self.page_bytes

    reserved_bytes = used_bytes


class Forest:
    def __init__(self, store: PageStore, n_kv_heads: int) -> None:
        size = _ITEM_BYTES[store.dtype]
        self.store, self.n_kv_heads = store, n_kv_heads
        self.keys = np.zeros((n_kv_heads, 0, store.key_dim * size), np.uint8)
        self.values = np.zeros((n_kv_heads, 0, store.value_dim * size), np.uint8)
        self.inserts = 0
        store.forests.add(self)

    def __len__(self) -> int:
        return self.keys.shape[1]

    def n_pages(self) -> list[int]:
        return [-(-len(self) // PAGE)] * self.n_kv_heads

    def fork(self) -> Forest:
        child = Forest(self.store, self.n_kv_heads)
        child.keys, child.values, child.inserts = self.keys, self.values, self.inserts
        return child

    def crop(self, n_tokens: int) -> None:
        if not 0 <= n_tokens <= len(self):
            raise ValueError(f"n_tokens must be in 0..={len(self)}, got {n_tokens}")
        self.keys, self.values = self.keys[:, :n_tokens], self.values[:, :n_tokens]

    def read(
        self,
        start: int,
        stop: int,
        out_keys: np.ndarray,
        out_values: np.ndarray,
        key_at: int | None = None,
        value_at: int | None = None,
    ) -> None:
        if not 0 <= start <= stop <= len(self):
            raise ValueError(f"start..stop must lie in 0..={len(self)}, got {start}..{stop}")
        rows = np.concatenate([self.keys, self.values], -1)[:, start:stop]
        at = key_at or 0, self.keys.shape[-1] if value_at is None else value_at
        for out, first in zip((out_keys, out_values), at, strict=True):
            out[:] = rows[..., first : first + out.shape[-1]]

    def validate(self) -> None:
        assert self.keys.shape[1] == self.values.shape[1]

    def index_bytes(self) -> int:
        return 0

    def counters(self) -> dict[str, int]:
        return {"inserts": self.inserts, "splits": 0, "seals": 0, "segments": 0, "tail_tokens": len(self)}

    def digest(self) -> int:
        return hash((self.keys.tobytes(), self.values.tobytes()))


def extend(pool: Pool, forests: list[Forest], keys: list[np.ndarray], values: list[np.ndarray]) -> None:
    for row, (forest, new) in enumerate(zip(forests, keys, strict=True)):
        if not np.isfinite(decode(new, forest.store.dtype)).all():
            raise ValueError(f"keys of row {row} hold NaN or infinity")
    for forest, new_keys, new_values in zip(forests, keys, values, strict=True):
        store, n_new = forest.store, new_keys.shape[1]
        pages = -(-(len(forest) + n_new) // PAGE) - forest.n_pages()[0]
        needed = pages * forest.n_kv_heads * store.page_bytes
        if store.limit_bytes is not None and store.used_bytes() + needed > store.limit_bytes:
            available = store.limit_bytes - store.used_bytes()
            raise MemoryError(f"page store needs {needed} bytes, {available} available")
        forest.keys = np.concatenate([forest.keys, new_keys], axis=1)
        forest.values = np.concatenate([forest.values, new_values], axis=1)
        forest.inserts += n_new


def search(
    pool: Pool,
    forests: list[Forest],
    queries: np.ndarray,
    k: int,
    *,
    scaling: float,
    softcap: float | None = None,
    candidates: int | None = None,
    probe_mass: float | None = None,
    exact: bool = False,
    estimate_unread: bool = False,
) -> Selection:
    if estimate_unread and forests and not forests[0].store.value_means:
        raise ValueError("estimate_unread must be false for a store without mean values")
    if not np.isfinite(queries).all():
        raise ValueError(f"queries of row {int(np.argwhere(~np.isfinite(queries))[0][0])} hold NaN or infinity")
    n_rows, n_heads, group, _ = queries.shape
    width = min(k, max(max(forest.n_pages()) for forest in forests))
    selection = Selection(forests, np.full((n_rows, n_heads, width), -1, np.int64))
    selection.lse = np.full((n_rows, n_heads, group, 2), -np.inf, np.float32)
    if estimate_unread:
        selection.unread = np.zeros((n_rows, n_heads, group, forests[0].store.value_dim), np.float32)
    for r, forest in enumerate(forests):
        n_pages = forest.n_pages()[0]
        if n_pages == 0:
            continue
        selection.visited[r] = n_pages
        logits = np.einsum("hgd,hnd->hgn", queries[r], decode(forest.keys, forest.store.dtype)) * scaling
        if softcap is not None:
            logits = softcap * np.tanh(logits / softcap)
        padded = np.full((n_heads, group, n_pages * PAGE), -np.inf)
        padded[..., : len(forest)] = logits
        page_lse = np.logaddexp.reduce(padded.reshape(n_heads, group, n_pages, PAGE), axis=-1)
        total = np.logaddexp.reduce(page_lse, axis=-1)
        mass = np.exp(page_lse - total[..., None]).sum(1)
        order = np.argsort(-mass, axis=-1, kind="stable")[:, :width]
        selection.pages[r, :, : order.shape[1]] = order
        selection.scores[r, :, : order.shape[1]] = np.take_along_axis(mass, order, -1)
        chosen = np.take_along_axis(page_lse, np.repeat(order[:, None], group, 1), -1)
        selection.lse[r, ..., 0], selection.lse[r, ..., 1] = total, np.logaddexp.reduce(chosen, axis=-1)
        if selection.unread is not None and width < n_pages:
            values = np.zeros((n_heads, n_pages * PAGE, forest.store.value_dim), np.float32)
            values[:, : len(forest)] = decode(forest.values, forest.store.dtype)
            counts = np.minimum(len(forest) - PAGE * np.arange(n_pages), PAGE)
            means = values.reshape(n_heads, n_pages, PAGE, -1).sum(2) / counts[:, None]
            left = page_lse.copy()
            np.put_along_axis(left, np.repeat(order[:, None], group, 1), -np.inf, -1)
            share = np.exp(left - np.logaddexp.reduce(left, axis=-1)[..., None])
            selection.unread[r] = np.einsum("hgp,hpd->hgd", share, means)
    return selection


def select_pages(forests: list[Forest], pages: np.ndarray) -> Selection:
    return Selection(forests, np.ascontiguousarray(pages, np.int64))


def random_pages(forests: list[Forest], k: int, seeds: list[int]) -> Selection:
    everything = all_pages(forests)
    drawn = np.full((*everything.pages.shape[:2], min(k, everything.pages.shape[2])), -1, np.int64)
    for r, seed in enumerate(seeds):
        for head, pages in enumerate(everything.pages[r]):
            chosen = np.random.default_rng([seed, head]).permutation(pages[pages >= 0])[:k]
            drawn[r, head, : len(chosen)] = chosen
    return select_pages(forests, drawn)


def all_pages(forests: list[Forest]) -> Selection:
    width = max(max(forest.n_pages()) for forest in forests)
    pages = np.full((len(forests), forests[0].n_kv_heads, width), -1, np.int64)
    for r, forest in enumerate(forests):
        pages[r, :, : forest.n_pages()[0]] = np.arange(forest.n_pages()[0])
    return Selection(forests, pages)


class Selection:
    def __init__(self, forests: list[Forest], pages: np.ndarray) -> None:
        self._stores = [forest.store for forest in forests]
        self._keys, self._values = [f.keys for f in forests], [f.values for f in forests]
        self._lengths = [len(forest) for forest in forests]
        self.pages = pages
        self.scores = np.full(pages.shape, -np.inf, np.float32)
        self.lse = np.full((*pages.shape[:2], 1, 2), -np.inf, np.float32)
        self.visited = np.zeros(pages.shape[:2], np.int64)
        self.unread: np.ndarray | None = None

    @property
    def counts(self) -> np.ndarray:
        return (self.positions() >= 0).sum(-1).astype(np.int32)

    def positions(self) -> np.ndarray:
        slots = self.pages[..., None] * PAGE + np.arange(PAGE)
        lengths = np.array(self._lengths)[:, None, None, None]
        return np.where((self.pages[..., None] >= 0) & (slots < lengths), slots, -1).astype(np.int32)

    def gather(
        self,
        _pool: Pool,
        first: int,
        last: int,
        out_keys: np.ndarray,
        out_values: np.ndarray,
        key_at: int | None = None,
        value_at: int | None = None,
    ) -> int:
        copied = 0
        for r, head, p in np.ndindex(self.pages.shape[0], self.pages.shape[1], last - first):
            live = self.positions()[r, head, first + p]
            live = live[live >= 0]
            rows = np.concatenate([self._keys[r], self._values[r]], -1)[head, live]
            at = key_at or 0, self._keys[r].shape[-1] if value_at is None else value_at
            for out, start in zip((out_keys, out_values), at, strict=True):
                out[r, head, p] = 0
                out[r, head, p, : len(live)] = rows[:, start : start + out.shape[-1]]
                copied += rows[:, start : start + out.shape[-1]].nbytes
        return copied
