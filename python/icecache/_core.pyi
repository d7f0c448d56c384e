"""Types of the compiled core. Written by hand; a test compares it with the module.

Dimension key: R rows (sequences), H KV heads, G query heads per KV head, K pages, n tokens or vectors, dim elements.
"bytes" as an axis stands for dim * itemsize: keys and values cross as C-contiguous uint8 views of their elements.
Arrays are borrowed for the length of the call. Arguments that do not fit raise `ValueError` or `TypeError` with the
name of the argument, what came and what was expected, and change nothing.
"""

import numpy as np
import numpy.typing as npt

_Bytes = npt.NDArray[np.uint8]

def simd() -> str:
    """Name of the instruction set that the loops use on this machine."""

class Pool:
    """Worker threads for the calls that take a pool; nothing uses a global one.

    Parameters
    ----------
    threads : int, optional
        1..=1024. Default: ``ICECACHE_NUM_THREADS``, or the cores this process may use.
    """

    def __init__(self, threads: int | None = None) -> None: ...
    @property
    def threads(self) -> int:
        """Number of worker threads."""

class PageStore:
    """Memory for pages of 16 keys and 16 values, shared by any number of forests.

    Parameters
    ----------
    key_dim, value_dim : int
        Elements of a key (1..=65536) and of a value (0..=65536; 0 stores keys only).
    dtype : {"float32", "float16", "bfloat16"}
    limit_bytes : int, optional
        Most bytes of pages in use; a call that needs more raises `MemoryError` and changes nothing.
    """

    def __init__(self, key_dim: int, value_dim: int, dtype: str, *, limit_bytes: int | None = None) -> None: ...
    @property
    def key_dim(self) -> int:
        """Elements of a key."""
    @property
    def value_dim(self) -> int:
        """Elements of a value."""
    @property
    def dtype(self) -> str:
        """Element type."""
    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""
    def used_bytes(self) -> int:
        """Bytes of the pages in use."""
    def reserved_bytes(self) -> int:
        """Bytes taken from the system."""

class Forest:
    """The keys and values of one sequence of one layer: a tree of pages per KV head, all of the same length.

    Reads and searches never wait for a writer; writers of one forest wait for each other.

    Parameters
    ----------
    store : PageStore
    n_kv_heads : int
        1..=65536.
    """

    def __init__(self, store: PageStore, n_kv_heads: int) -> None: ...
    @property
    def n_kv_heads(self) -> int:
        """KV heads."""
    def __len__(self) -> int: ...
    def n_pages(self) -> list[int]:
        """Pages of each head."""
    def fork(self) -> Forest:
        """Make a forest with the same tokens that shares all pages; neither sees what the other adds later."""
    def crop(self, n_tokens: int) -> None:
        """Keep the first `n_tokens` tokens; the result equals a build of that prefix."""
    def read(self, start: int, stop: int, out_keys: _Bytes, out_values: _Bytes) -> None:
        """Copy the keys and values of tokens start..stop to uint8 arrays (H, stop - start, bytes)."""
    def validate(self) -> None:
        """Check every invariant; `RuntimeError` names the first one that does not hold."""
    def index_bytes(self) -> int:
        """Bytes of the index beside the pages."""
    def counters(self) -> dict[str, int]:
        """Count what happened (inserts, splits, seals) and what there is (segments, tail_tokens), over all heads."""
    def digest(self) -> int:
        """Hash of the whole structure: the layout of the pages and their bytes."""

def extend(pool: Pool, forests: list[Forest], keys: list[_Bytes], values: list[_Bytes]) -> None:
    """Add tokens to many sequences; row r gets keys and values uint8 (H, n_r, bytes). On an error nothing changes.

    Raises
    ------
    ValueError
        NaN or infinity in a key (row, head and token are named), a wrong shape, or a forest named twice.
    MemoryError
        The limit of the store; the message has the bytes needed and available.
    """

def search(
    pool: Pool,
    forests: list[Forest],
    queries: npt.NDArray[np.float32],
    k: int,
    *,
    scaling: float,
    softcap: float | None = None,
    candidates: int | None = None,
    probe_mass: float | None = None,
    exact: bool = False,
) -> Selection:
    """Find the `k` pages with the largest attention mass for every KV head and its group of queries.

    Parameters
    ----------
    queries : float32 array, (R, H, G, key_dim)
    scaling : float
        Factor of query . key before the softmax.
    softcap : float, optional
        ``softcap * tanh(logit / softcap)`` is applied to scaled logits.
    candidates : int, optional
        Pages scored from their keys. Default: max(6 k, 112).
    probe_mass : float, optional
        Share of the estimated mass that visited super-groups must hold, for long sequences.
    exact : bool
        Score every page from its keys.
    """

def select_pages(forests: list[Forest], pages: npt.NDArray[np.int64]) -> Selection:
    """Choose the given pages, int64 (R, H, K) ids of the current snapshots, -1 for none."""

def all_pages(forests: list[Forest]) -> Selection:
    """Choose every page of every head; K is the largest number of pages of a head."""

class Selection:
    """Pages chosen per (row, KV head); made by `search`, `select_pages` and `all_pages`.

    It keeps the snapshots it came from alive: its pages stay as they were, whatever happens to the forests.
    """

    @property
    def pages(self) -> npt.NDArray[np.int64]:
        """Page ids, (R, H, K); -1 for none, unique per head."""
    @property
    def counts(self) -> npt.NDArray[np.int32]:
        """Live tokens of each page, (R, H, K)."""
    @property
    def scores(self) -> npt.NDArray[np.float32]:
        """Share of the softmax mass of each page, averaged over the group, (R, H, K), best first."""
    @property
    def lse(self) -> npt.NDArray[np.float32]:
        """Natural log-sum-exp of scaled logits, (R, H, G, 2): all pages (estimate), chosen pages (exact).

        Minus infinity when empty; G is 0 when no search made the selection.
        """
    @property
    def visited(self) -> npt.NDArray[np.int64]:
        """Page summaries scored, (R, H)."""
    def positions(self) -> npt.NDArray[np.int32]:
        """Token of each slot, (R, H, K, 16), live slots first, then -1."""
    def gather(self, pool: Pool, first: int, last: int, out_keys: _Bytes, out_values: _Bytes) -> int:
        """Copy pages first..last to uint8 arrays (R, H, last - first, 16, bytes); returns the bytes of live rows.

        Live slots come first, unused slots are zeroed.
        """

class VectorIndex:
    """Vectors with ids, searched by inner product, squared L2 or cosine; `icecache.Index` is the friendly side of it.

    Parameters
    ----------
    dim : int
        1..=65536.
    metric : {"ip", "l2", "cosine"}
    dtype : {"float32", "float16", "bfloat16"}
    center : bool, default=True
    seed : int, default=0
    """

    def __init__(self, dim: int, metric: str, dtype: str, center: bool = True, seed: int | None = None) -> None: ...
    @property
    def dim(self) -> int:
        """Length of a vector."""
    @property
    def metric(self) -> str:
        """``ip``, ``l2`` or ``cosine``."""
    @property
    def dtype(self) -> str:
        """How vectors are stored."""
    def __len__(self) -> int: ...
    def add(
        self, pool: Pool, ids: npt.NDArray[np.int64] | None, vectors: npt.NDArray[np.float32], on_conflict: str
    ) -> npt.NDArray[np.int64]:
        """Add vectors (n, dim) under the given ids (n,) or the next free ones; returns the ids."""
    def search(
        self,
        pool: Pool | None,
        queries: npt.NDArray[np.float32],
        k: int,
        beam: int | None = None,
        exact: bool = False,
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Ids and distances (n, k) of the nearest vectors of queries (n, dim); without a pool on this thread."""
    def remove(self, pool: Pool, ids: npt.NDArray[np.int64], strict: bool) -> int:
        """Remove ids (n,); returns how many there were. With `strict`, a missing one is a `KeyError`."""
    def get(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """Vectors by id, (n, dim)."""
    def contains(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Whether each id is there, (n,)."""
    def nbytes(self) -> int:
        """Bytes of pages, summaries, ids and maps."""
    def stats(self) -> dict[str, int]:
        """Counters: vectors, removed, segments, pages, tail, page_bytes, index_bytes, compactions."""
    def copy(self) -> VectorIndex:
        """Make an independent index with the same content; pages are shared."""
    def validate(self) -> None:
        """Check every invariant; `RuntimeError` names the first one that does not hold."""
    def to_bytes(self) -> bytes:
        """Give the index as a file."""
    @staticmethod
    def from_bytes(pool: Pool, data: bytes) -> VectorIndex:
        """Make the index of a file that `to_bytes` made; `icecache.errors.IndexFormatError` if it is none."""
