"""Types of the compiled core. Written by hand; a test compares it with the module.

Dimension key: R rows (sequences), H KV heads, G query heads per KV head, K pages, n tokens or vectors, dim elements.
"bytes" as an axis stands for dim * itemsize: keys and values cross as C-contiguous uint8 views of their elements.
Arrays are borrowed for the length of the call. Arguments that do not fit raise `ValueError` or `TypeError` with the
name of the argument, what came and what was expected, and change nothing.
"""

from collections.abc import Callable
from os import PathLike

import numpy as np
import numpy.typing as npt

_Bytes = npt.NDArray[np.uint8]
_Ints = npt.NDArray[np.int64]
_At = int | None

def simd() -> str:
    """Name of the instruction set that the loops use on this machine."""

class Pool:
    """1..=1024 worker threads, by default ``ICECACHE_NUM_THREADS`` or the cores this process may use."""

    def __init__(self, threads: int | None = None) -> None: ...
    @property
    def threads(self) -> int:
        """Number of worker threads."""

class Mirror:
    """What changed in the pages of many trees since the last look; keeps those pages as they were until the next."""

    def __init__(self) -> None: ...
    def update(
        self, pool: Pool, forests: list[Forest], stride: int
    ) -> tuple[_Ints, _Ints, npt.NDArray[np.int32], _Ints, int]:
        """Slots (``tree * stride + slot``) and words of changes, slots in use and tokens by tree, most slots in use."""
    def foresee(self, pool: Pool, forests: list[Forest], stride: int) -> None:
        """Look ahead at what the forests will be at the next `update`: if they are, that has nothing to compare."""
    def clear(self) -> None:
        """Forget the last look, so that its pages can be freed."""

def default_workers() -> int:
    """Search workers that suit this machine; 0: fewer cores than a step with polling workers needs."""

def spare_cores() -> list[int]:
    """Cores that search workers leave to everything else on this machine."""

def topology() -> tuple[int, int, int]:
    """Logical cores and physical cores of this process, and their NUMA nodes."""

class HostMemory:
    """Memory for the pages and mailboxes of one runtime, given back when its last user goes.

    `pin`: "never" page-locked for CUDA device `device`; "auto", if that works, `fallback_reason()` says why not;
    "always", or an error; "simulated", for tests, as if there were a device that accepts `simulated_limit` bytes.
    Threads of `pool` touch large pieces first. More than `limit_bytes` at a time raise `MemoryError`.
    """

    def __init__(
        self,
        pool: Pool,
        *,
        pin: str = "never",
        limit_bytes: int | None = None,
        device: int | None = None,
        simulated_limit: int | None = None,
    ) -> None: ...
    def lend(self, n_bytes: int) -> npt.NDArray[np.uint8]:
        """Lend zeroed memory, not copied; given back with the last array that views it. `MemoryError`: no room."""
    def reserved_bytes(self) -> int:
        """Bytes held now."""
    def pinned_bytes(self) -> int:
        """Bytes held now that are page-locked."""
    def pin_seconds(self) -> float:
        """Seconds spent on committing and page-locking so far."""
    def is_pinned(self) -> bool:
        """Whether a device can read all of it in place."""
    def fallback_reason(self) -> str | None:
        """Why memory that should have been page-locked is pageable; None: nothing of the kind happened."""

class Engine:
    """Threads that search for a device, bound to cores.

    `workers` 1..=256, by default `default_workers()`, which raises where that is 0. They poll `linger_us` for the next
    step before they sleep; the end of a step waits `patience_ms` for one that is still searching.
    """

    def __init__(
        self,
        workers: int | None = None,
        *,
        pin_threads: bool = True,
        linger_us: int | None = None,
        patience_ms: int | None = None,
    ) -> None: ...
    @property
    def workers(self) -> int:
        """Search workers."""
    def mailbox(
        self,
        memory: HostMemory,
        *,
        n_layers: int,
        n_rows: int,
        n_kv_heads: int,
        group: int,
        key_dim: int,
        capacity: int,
        dtype: str,
    ) -> Mailbox:
        """Mailbox for up to `n_rows` sequences of `n_layers` layers that search.

        `dtype` is that of the queries; an answer has at most `capacity` pages per (row, KV head).
        """

class Mailbox:
    """Memory through which a device posts queries and gets pages, and the steps that use it. Made by `Engine.mailbox`.

    Calls may come from any thread; the device must have finished a step before `end_step`, `abort` or the end of the
    mailbox.
    """

    @property
    def memory(self) -> _Bytes:
        """Its bytes, not copied; the array keeps the mailbox alive. What lies where: `arrays`."""
    @property
    def arrays(self) -> dict[str, tuple[int, int]]:
        """Offset and distance between layers, bytes, of each array."""
    def bind(
        self,
        layer: int,
        forests: list[Forest],
        k: int,
        *,
        scaling: float,
        softcap: float | None = None,
        candidates: int | None = None,
        probe_mass: float | None = None,
        exact: bool = False,
    ) -> None:
        """Set the sequences of a search layer, one per row, and how they are searched, from the next step on."""
    def begin_step(self, *, refresh: bool = False) -> int:
        """Start a step and return its ticket, 1..2**32; workers answer from now on.

        With `refresh`, or after `bind`, it searches what the forests hold now; otherwise what the step before searched.
        """
    def end_step(self) -> None:
        """End the step, which the device has finished; raises what went wrong. Without a step it does nothing."""
    def abort(self) -> None:
        """End the step, if there is one, whatever became of it. The device must have finished it."""
    def unbind(self) -> None:
        """Forget all sequences, so that their pages can be freed."""
    def times(self) -> npt.NDArray[np.int64]:
        """Of the last ended step (layers, 3), nanoseconds.

        When each request was seen and when it was answered, since the step began; longest search of one (row, head).
        """
    def _fault(self, place: tuple[int, int] | None, stall_ms: int | None = None) -> None: ...

class PageStore:
    """Memory for pages of 16 keys and 16 values, shared by any number of forests.

    1..=65536 elements of a key, 0..=65536 of a value (0 stores keys only), "float32", "float16" or "bfloat16". A call
    that needs more than `limit_bytes` of pages raises `MemoryError` and changes nothing. Memory comes in pieces of
    `slab_bytes` from `memory`, by default this process's allocator. `value_means` keeps the mean of each page's values.
    """

    def __init__(
        self,
        key_dim: int,
        value_dim: int,
        dtype: str,
        *,
        limit_bytes: int | None = None,
        memory: HostMemory | None = None,
        slab_bytes: int | None = None,
        value_means: bool = False,
    ) -> None: ...
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
    def value_means(self) -> bool:
        """Whether mean values of pages are kept."""
    @property
    def page_bytes(self) -> int:
        """Bytes of a page."""
    def used_bytes(self) -> int:
        """Bytes of the pages in use."""
    def reserved_bytes(self) -> int:
        """Bytes taken from the system."""
    def charge(self, n_bytes: int) -> None:
        """Count other memory, in whole pages, towards the limit until `discharge`; `MemoryError` if it is full."""
    def discharge(self, n_bytes: int) -> None:
        """End what `charge` began."""
    def start_background(self) -> None:
        """Begin the thread that packs aside; it inherits cores and priority of the calling thread."""
    def reserve(self, n_bytes: int) -> None:
        """Take memory now for `n_bytes` more of pages, up to the limit: page-locking it later would delay a step."""

class Forest:
    """The keys and values of one sequence of one layer: a tree of pages per KV head, all of the same length.

    Any number of threads may read, search and write at the same time; nobody waits for anybody. 1..=65536 heads.
    """

    def __init__(self, store: PageStore, n_kv_heads: int) -> None: ...
    @property
    def n_kv_heads(self) -> int:
        """KV heads."""
    def __len__(self) -> int: ...
    def n_pages(self) -> list[int]:
        """Pages of each head."""
    def insert(self, keys: _Bytes, values: _Bytes) -> int:
        """Add one token: uint8 (H, bytes) keys and values. Return its position; every later search finds it.

        Nothing changes with a ValueError (NaN or infinity in a key, a wrong shape) or MemoryError (the store is full).
        """
    def settle(self) -> None:
        """Route all inserted tokens into the trees; searches see no difference, `digest` does."""
    def fork(self) -> Forest:
        """Make a forest with the same tokens that shares all pages; neither sees what the other adds later."""
    def ahead(self) -> Ahead:
        """Make a continuation that takes tokens unseen, until `adopt`."""
    def adopt(self, ahead: Ahead) -> bool:
        """Take over the tokens of a continuation of this forest, or of the one it was forked from, all at once.

        False, and nothing changes, if this forest changed since.
        """
    def crop(self, n_tokens: int) -> None:
        """Keep the first `n_tokens` tokens; the result equals a build of that prefix."""
    def read(
        self, start: int, stop: int, out_keys: _Bytes, out_values: _Bytes, key_at: _At = None, value_at: _At = None
    ) -> None:
        """Copy tokens start..stop to uint8 arrays (H, stop - start, bytes), or columns from a byte of [key, value]."""
    def validate(self) -> None:
        """Check every invariant; `RuntimeError` names the first one that does not hold."""
    def index_bytes(self) -> int:
        """Bytes of the index beside the pages."""
    def counters(self) -> dict[str, int]:
        """Count what happened (inserts, splits, seals) and what there is (segments, tail_tokens), over all heads."""
    def digest(self) -> int:
        """Hash of the whole structure: the layout of the pages and their bytes."""

class Ahead:
    """A sequence that continues a forest unseen until the forest adopts it. Made by `Forest.ahead`."""

    @property
    def forest(self) -> Forest:
        """The forest to add tokens to; it shares all pages with the one it continues."""

def extend(pool: Pool, forests: list[Forest], keys: list[_Bytes], values: list[_Bytes]) -> None:
    """Add tokens to many sequences; row r gets keys and values uint8 (H, n_r, bytes). On an error nothing changes.

    ValueError: NaN or infinity in a key (row, head and token are named), a wrong shape, or a forest named twice.
    MemoryError: the limit of the store; the message has the bytes needed and available.
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
    estimate_unread: bool = False,
) -> Selection:
    """Find the `k` pages with the largest attention mass for every KV head and its group of queries.

    Parameters
    ----------
    queries : float32 array, (R, H, G, key_dim)
    scaling, softcap : float
        Factor of query . key before the softmax; ``softcap * tanh(logit / softcap)`` is applied to scaled logits.
    candidates : int, optional
        Pages scored from their keys. Default: max(6 k, 112).
    probe_mass : float, optional
        Share of the estimated mass that visited super-groups must hold, for long sequences.
    exact : bool
        Score every page from its keys.
    estimate_unread : bool
        Estimate what the other pages would give, from mean values that their store keeps (`value_means`).
    """

def select_pages(forests: list[Forest], pages: npt.NDArray[np.int64]) -> Selection:
    """Choose the given pages, int64 (R, H, K) ids of the current snapshots, -1 for none."""

def random_pages(forests: list[Forest], k: int, seeds: list[int]) -> Selection:
    """Draw `k` different pages of each head, all where it has fewer; one seed in 0..2**64 per forest."""

def all_pages(forests: list[Forest]) -> Selection:
    """Choose every page of every head; K is the largest number of pages of a head."""

class Selection:
    """Pages chosen per (row, KV head); they stay as they were, whatever happens to the forests."""

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
    def unread(self) -> npt.NDArray[np.float32] | None:
        """What the pages that are not chosen would give by estimate, (R, H, G, value_dim); None if nobody asked."""
    @property
    def visited(self) -> npt.NDArray[np.int64]:
        """Page summaries scored, (R, H)."""
    def positions(self) -> npt.NDArray[np.int32]:
        """Token of each slot, (R, H, K, 16), live slots first, then -1."""
    def gather(
        self,
        pool: Pool,
        first: int,
        last: int,
        out_keys: _Bytes,
        out_values: _Bytes,
        key_at: _At = None,
        value_at: _At = None,
    ) -> int:
        """Copy pages first..last to uint8 arrays (R, H, last - first, 16, bytes); returns the bytes of live rows.

        Live slots come first, unused slots are zeroed. `key_at`, `value_at`: other columns, as in `Forest.read`.
        """

class PaperForest:
    """Keys of one sequence of one layer in trees of M-DCI as published, one per KV head.

    Parameters
    ----------
    store : PageStore
        With `value_dim` 0: values are not read here.
    n_kv_heads : int
        1..=65536.
    """

    def __init__(self, store: PageStore, n_kv_heads: int) -> None: ...
    def __len__(self) -> int:
        """Tokens of each head."""

    def extend(self, pool: Pool, keys: _Bytes) -> None:
        """Add keys (H, n, bytes): a bulk build if there are none yet, one by one otherwise."""

def paper_search(
    pool: Pool, forests: list[PaperForest], queries: npt.NDArray[np.float32], k: int
) -> npt.NDArray[np.int32]:
    """Tokens of the `k` best pages of every KV head, (R, H, 16 k), -1 behind the last.

    One search per query of (R, H, G, dim) with the authors' field of view; ranked lists are interleaved over the group.
    """

class VectorIndex:
    """Vectors with ids; `icecache.Index`, the friendly side of it, has the parameters."""

    def __init__(
        self, dim: int, metric: str, dtype: str, center: bool = True, seed: int | None = None, codes: bool = True
    ) -> None: ...
    @property
    def dim(self) -> int:
        """Length of a vector."""
    @property
    def metric(self) -> str:
        """``ip``, ``l2`` or ``cosine``."""
    @property
    def dtype(self) -> str:
        """How vectors are stored."""
    @property
    def codes(self) -> bool:
        """Whether 4-bit codes of the vectors are kept where they pay."""
    def __len__(self) -> int: ...
    @property
    def read_only(self) -> bool:
        """Whether it is a snapshot or a mapped file."""
    def mean(self) -> npt.NDArray[np.float32]:
        """Give what is subtracted from every vector before it is stored, (dim,)."""
    def add(
        self,
        pool: Pool,
        ids: npt.NDArray[np.int64] | None,
        vectors: npt.NDArray[np.generic],
        on_conflict: str,
        progress: Callable[[int, int], bool | None] | None = None,
    ) -> npt.NDArray[np.int64]:
        """Add vectors (n, dim) under the given ids (n,) or the next free ones; returns the ids.

        float32, float64, float16 or, as uint16, bfloat16. `progress(done, total)` is called now and then and cancels
        with `False`.
        """
    def search(
        self,
        pool: Pool | None,
        queries: npt.NDArray[np.float32],
        k: int,
        *,
        beam: int | None = None,
        recall: float | None = None,
        exact: bool = False,
        filter: Filter | None = None,  # noqa: A002 -- the name users look for
        out: tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]] | None = None,
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Ids and distances (n, k) of the nearest vectors of queries (n, dim); without a pool on this thread."""
    def set_sample(self, queries: npt.NDArray[np.float32]) -> None:
        """Take a sample of queries (n, dim) as what recall is measured with; an empty one: stored vectors."""
    def calibrate(
        self, pool: Pool | None, k: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Pages per query, the recall of the `k` nearest with so many, and its standard error, each (n,)."""
    def range_search(
        self,
        pool: Pool | None,
        queries: npt.NDArray[np.float32],
        radius: float,
        *,
        beam: int | None = None,
        filter: Filter | None = None,  # noqa: A002 -- the name users look for
        max_results: int | None = None,
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Limits (n + 1,), ids and distances of the vectors within `radius` of queries (n, dim)."""
    def search_pages(
        self,
        pool: Pool | None,
        queries: npt.NDArray[np.float32],
        n_pages: int,
        *,
        group: int = 1,
        scaling: float | None = None,
        exact: bool = False,
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Page numbers and scores (n / group, n_pages) and mass (n,) for queries (n, dim) in groups."""
    def pages(
        self,
    ) -> tuple[
        npt.NDArray[np.int64],
        npt.NDArray[np.uint8],
        npt.NDArray[np.float32],
        npt.NDArray[np.float32],
        npt.NDArray[np.uint32],
    ]:
        """Ids (n, 16), counts, means (n, dim), spreads and generations (n,) of all pages."""
    def remove(self, pool: Pool, ids: npt.NDArray[np.int64], strict: bool) -> int:
        """Remove ids (n,); returns how many there were. With `strict`, a missing one is a `KeyError`."""
    def get(self, ids: npt.NDArray[np.int64], out: npt.NDArray[np.float32] | None = None) -> npt.NDArray[np.float32]:
        """Vectors by id, (n, dim); written to `out` if given."""
    def contains(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
        """Whether each id is there, (n,)."""
    def nbytes(self) -> int:
        """Bytes of pages, summaries, ids and maps."""
    def stats(self) -> dict[str, int]:
        """Counters: vectors, removed, segments, pages, tail, page_bytes, index_bytes, compactions."""
    def copy(self) -> VectorIndex:
        """Make an independent index with the same content; pages are shared."""
    def snapshot(self) -> VectorIndex:
        """Make the read-only index of this moment; it shares everything."""
    def compact(self, pool: Pool, progress: Callable[[int, int], bool | None] | None = None) -> None:
        """Pack all vectors again, as one bulk addition would."""
    def validate(self) -> None:
        """Check every invariant; `RuntimeError` names the first one that does not hold."""
    def to_bytes(self) -> bytes:
        """Give the index as a file."""
    def save(self, path: str | PathLike[str]) -> None:
        """Write the index to a new file that then replaces `path`."""
    @staticmethod
    def from_bytes(pool: Pool, data: npt.NDArray[np.uint8]) -> VectorIndex:
        """Make the index of a file in memory (n,); `icecache.errors.IndexFormatError` if it is none."""
    @staticmethod
    def open_mapped(pool: Pool, path: str | PathLike[str], verify: bool) -> VectorIndex:
        """Map a file read-only; with `verify` all of it is checked, else all but its pages."""

class Filter:
    """Which ids a search may return; made once, used with any index.

    Parameters
    ----------
    allowed : int64 array or bool array, (n,)
        The allowed ids, or ``allowed[id]`` for every id.
    """

    def __init__(self, allowed: npt.NDArray[np.int64] | npt.NDArray[np.bool_]) -> None: ...
