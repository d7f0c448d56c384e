"""`Index`: a dynamic nearest-neighbour index whose leaves are pages of 16 vectors."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import numpy.typing as npt

from icecache import _core
from icecache.index.brute import Metric
from icecache.index.convert import as_ids, as_matrix, as_rows, from_tensor
from icecache.index.filter import FilterLike, as_filter
from icecache.index.pool import shared_pool
from icecache.index.result import SearchResult

Dtype = Literal["float32", "float16", "bfloat16"]
OnConflict = Literal["error", "replace", "skip"]
Missing = Literal["ignore", "error"]
#: Told (vectors done, vectors in all) now and then; `False` cancels the call.
Progress = Callable[[int, int], "bool | None"]


class Index:
    """Maximum inner product, squared L2 or cosine search over vectors that come and go.

    Parameters
    ----------
    dim : int
        Length of a vector.
    metric : {"ip", "l2", "cosine"}, default="ip"
        Distance, always smaller = closer: minus the inner product, squared L2, 1 - cosine.
    dtype : {"float32", "float16", "bfloat16"}, default="float32"
        How vectors are stored. Queries and sums stay in float32.
    center : bool, default=True
        Subtract the mean of the first 1024 or more vectors before storing. The ranking does not change (for ``ip``
        every score moves by the same constant), distances are reported for the vectors as given; pages get better
        because keys with a large common part look alike otherwise.
    seed : int, default=0
        Start of the ordering of bulk additions. Same seed, same calls: same index, whatever the number of threads.
    threads : int, optional
        Worker threads for bulk additions and query batches. Default: ``ICECACHE_NUM_THREADS`` or the cores this process
        may use. One query never uses more than one thread.

    Attributes
    ----------
    beam : int or None
        Pages of 16 vectors scored exactly per query where a search does not say otherwise. Default None: each query
        goes on until the vectors it has not looked at are expected to hold less than 1 in 40 of its k nearest.

    Notes
    -----
    **Concurrency.** Every method may be called from any thread at any time. A call that reads sees one snapshot: the
    state after some completed write, never half of one. Once `add` or `remove` has returned, every later call in any
    thread sees it; a removed id is never returned again. Readers never wait for writers. Writers of one index wait for
    each other. The GIL is released while the core works. `docs/index/concurrency.md` has the whole contract.
    """

    __slots__ = ("_core", "_threads", "beam")

    def __init__(
        self,
        dim: int,
        metric: Metric = "ip",
        *,
        dtype: Dtype = "float32",
        center: bool = True,
        seed: int = 0,
        threads: int | None = None,
    ) -> None:
        if threads is not None and threads < 1:
            msg = f"threads: expected at least 1, got {threads}"
            raise ValueError(msg)
        self._core = _core.VectorIndex(dim, metric, dtype, center, seed)
        self._threads = threads
        self.beam: int | None = None

    @classmethod
    def _of(cls, core: _core.VectorIndex, threads: int | None, beam: int | None = None) -> Index:
        index = cls.__new__(cls)
        index._core, index._threads, index.beam = core, threads, beam
        return index

    @classmethod
    def build(
        cls,
        vectors: npt.ArrayLike,
        ids: npt.ArrayLike | None = None,
        *,
        metric: Metric = "ip",
        dtype: Dtype = "float32",
        center: bool = True,
        seed: int = 0,
        threads: int | None = None,
        progress: Progress | None = None,
    ) -> Index:
        """Make an index of `vectors`, (n, dim); the same as `Index(dim, ...)` and one `add`.

        Raises
        ------
        ValueError, TypeError, CancelledError
            If `vectors` is not a matrix of finite numbers, or as `add`.
        """
        shape = np.shape(from_tensor(vectors, "vectors"))
        if len(shape) != 2:
            msg = f"vectors: expected shape (n, dim), got {shape}"
            raise ValueError(msg)
        index = cls(shape[1], metric, dtype=dtype, center=center, seed=seed, threads=threads)
        index.add(vectors, ids, progress=progress)
        return index

    @property
    def dim(self) -> int:
        """Length of a vector."""
        return self._core.dim

    @property
    def metric(self) -> str:
        """``ip``, ``l2`` or ``cosine``."""
        return self._core.metric

    @property
    def dtype(self) -> str:
        """How vectors are stored."""
        return self._core.dtype

    @property
    def page_tokens(self) -> int:
        """Vectors of a full page."""
        return 16

    @property
    def read_only(self) -> bool:
        """Whether this is a snapshot or a mapped file, which cannot be written to."""
        return self._core.read_only

    @property
    def mean(self) -> npt.NDArray[np.float32]:
        """What is subtracted from every vector before it is stored, (dim,): zeros until there are 1024 vectors."""
        return self._core.mean()

    def add(
        self,
        vectors: npt.ArrayLike,
        ids: npt.ArrayLike | None = None,
        *,
        on_conflict: OnConflict = "error",
        threads: int | None = None,
        progress: Progress | None = None,
    ) -> npt.NDArray[np.int64]:
        """Add vectors; all of them or, on an error, none.

        Parameters
        ----------
        vectors : array_like, (n, dim) or (dim,)
        ids : array_like of int, (n,), optional
            In [0, 2**63). Default: the next free ids, counting up from the largest one ever used.
        on_conflict : {"error", "replace", "skip"}, default="error"
            What to do with an id that the index or an earlier row of this call holds: refuse the call, let the later
            vector win, or keep the earlier one.
        threads : int, optional
            Worker threads of this call. Default: the index's.
        progress : callable, optional
            Called as ``progress(done, total)`` about every 32,768 vectors, and last with ``done == total``. If it
            returns False or raises, nothing is added. It must not write to the same index.

        Returns
        -------
        int64 array, (n,)
            The id of each row (also of rows that were skipped).

        Raises
        ------
        ValueError
            Wrong shape, NaN or infinity (the message names the row), an id twice or out of range, a value that does
            not fit the dtype. The index is unchanged.
        TypeError
            Not numbers, or a tensor that is not on the CPU.
        MemoryError
            No room for the pages. The index is unchanged.
        CancelledError
            `progress` returned False. The index is unchanged, as it is after Ctrl-C or an error of `progress`.
        ReadOnlyIndexError
            The index is a snapshot or a mapped file.
        """
        rows, single = as_rows(vectors, "vectors", self.dim)
        given = None if ids is None else as_ids(np.reshape(from_tensor(ids, "ids"), -1) if single else ids)
        return self._core.add(self._pool(threads), given, rows, on_conflict, progress)

    def _pool(self, threads: int | None) -> _core.Pool:
        return shared_pool(self._threads if threads is None else threads)

    def search(
        self,
        queries: npt.ArrayLike,
        k: int = 10,
        *,
        beam: int | None = None,
        filter: FilterLike | None = None,  # noqa: A002 -- the name users look for
        exact: bool = False,
        threads: int | None = None,
        out: tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]] | None = None,
    ) -> SearchResult:
        """Find the `k` nearest vectors of each query.

        Parameters
        ----------
        queries : array_like, (n_queries, dim) or (dim,)
        k : int, default=10
            Neighbours per query. More than the index holds is fine: the rest is padded with -1 and +inf.
        beam : int, optional
            Pages scored exactly per query. Default: the attribute `beam`, or as many as this query needs.
        filter : Filter or bool array, (n,), or array_like of int, (m,), optional
            Return allowed ids only (see `Filter`). Fewer than `k` allowed: padded as above.
        exact : bool, default=False
            Look at every vector.
        threads : int, optional
            Worker threads of this call. Default: the index's.
        out : (int64 array, float32 array), optional
            Where ids and distances are written, C-contiguous and of the result's shape.

        Returns
        -------
        SearchResult
            ids int64 and distances float32, (n_queries, k), or (k,) for one query; nearest first, ties by id.

        Raises
        ------
        ValueError, TypeError
            Wrong shape or dtype, NaN or infinity (the message names the row), negative `k`, `beam` under 1.
        """
        matrix, single = as_matrix(queries, "queries", self.dim)
        if k < 0:
            msg = f"k: expected at least 0, got {k}"
            raise ValueError(msg)
        beam = self.beam if beam is None else beam
        if beam is not None and beam < 1:
            msg = f"beam: expected at least 1 page, got {beam}"
            raise ValueError(msg)
        pool = self._pool(threads) if len(matrix) > 1 else None
        rows = None if out is None else (out[0][None], out[1][None]) if single else (out[0], out[1])
        ids, distances = self._core.search(pool, matrix, k, beam=beam, exact=exact, filter=as_filter(filter), out=rows)
        return SearchResult(ids[0], distances[0]) if single else SearchResult(ids, distances)

    def remove(self, ids: npt.ArrayLike, *, missing: Missing = "ignore") -> int:
        """Remove vectors by id and return how many there were.

        Parameters
        ----------
        ids : array_like of int, (n,) or one int
        missing : {"ignore", "error"}, default="ignore"
            Whether an id that is not in the index is an error, in which case nothing is removed.

        Raises
        ------
        KeyError
            If an id is missing and `missing` is "error".
        """
        if missing not in ("ignore", "error"):
            msg = f"missing: expected 'ignore' or 'error', got {missing!r}"
            raise ValueError(msg)
        return self._core.remove(shared_pool(self._threads), as_ids(ids), missing == "error")

    def get(self, ids: npt.ArrayLike, *, out: npt.NDArray[np.float32] | None = None) -> npt.NDArray[np.float32]:
        """Vectors by id, as they were given, to within the rounding of the dtype they are stored in.

        Parameters
        ----------
        ids : array_like of int, (n,) or one int
        out : float32 array, (n, dim), optional
            Where the vectors are written.

        Returns
        -------
        float32 array, (n, dim), or (dim,) for one id

        Raises
        ------
        KeyError
            If an id is not in the index.
        """
        single = np.ndim(from_tensor(ids, "ids")) == 0
        rows = self._core.get(as_ids(ids), None if out is None else out[None] if single else out)
        return rows[0] if single else rows

    def __getitem__(self, ids: npt.ArrayLike) -> npt.NDArray[np.float32]:
        return self.get(ids)

    def contains(self, ids: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Whether the index holds each id, bool (n,)."""
        return self._core.contains(as_ids(ids))

    def __contains__(self, vector_id: object) -> bool:
        if isinstance(vector_id, bool) or not isinstance(vector_id, (int, np.integer)):
            return False
        return 0 <= int(vector_id) < 2**63 and bool(self._core.contains(as_ids([int(vector_id)]))[0])

    def __len__(self) -> int:
        return len(self._core)

    #: Not iterable: `__getitem__` takes ids, so the default iteration would be wrong.
    __iter__ = None

    def nbytes(self) -> int:
        """Bytes of memory the index holds: pages, summaries, ids."""
        return self._core.nbytes()

    def stats(self) -> dict[str, int]:
        """Count vectors, removed (not yet reclaimed), segments, pages, tail, page_bytes, index_bytes, compactions."""
        return self._core.stats()

    def validate(self) -> None:
        """Check every invariant of the structure; for tests.

        Raises
        ------
        RuntimeError
            Names the invariant that does not hold.
        """
        self._core.validate()

    def to_bytes(self) -> bytes:
        """Give the index as one checksummed, little-endian byte string (the contents of a saved file)."""
        return self._core.to_bytes()

    @classmethod
    def from_bytes(cls, data: bytes | bytearray | memoryview, *, threads: int | None = None) -> Index:
        """Make an index from what `to_bytes` gave; pages are packed again, so it takes as long as a build.

        Raises
        ------
        IndexFormatError
            Not an index, cut short, corrupted, or of another version.
        """
        return cls._of(_core.VectorIndex.from_bytes(shared_pool(threads), bytes(data)), threads)

    def save(self, file: str | os.PathLike[str] | BinaryIO) -> None:
        """Write the index to a path (a new file, then renamed over the old one) or to an open binary file."""
        data = self.to_bytes()
        if not isinstance(file, (str, os.PathLike)):
            file.write(data)
            return
        target = Path(file)
        # Not mkstemp: it would make the file private, whatever the user's umask says.
        beside = target.parent / f".{target.name}.{secrets.token_hex(8)}"
        try:
            with beside.open("xb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            beside.replace(target)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                beside.unlink()
            raise

    @classmethod
    def load(cls, file: str | os.PathLike[str] | BinaryIO, *, threads: int | None = None) -> Index:
        """Read what `save` wrote.

        Raises
        ------
        IndexFormatError
            Not an index, cut short, corrupted, or of another version.
        OSError
            If the file cannot be read.
        """
        data = Path(file).read_bytes() if isinstance(file, (str, os.PathLike)) else file.read()
        return cls.from_bytes(data, threads=threads)

    def snapshot(self) -> Index:
        """Give the read-only index of this moment, in O(1): searches on it are repeatable, whatever is written later.

        It keeps what it shows in memory for as long as it lives.
        """
        return self._of(self._core.snapshot(), self._threads, self.beam)

    def compact(self, *, threads: int | None = None, progress: Progress | None = None) -> None:
        """Pack all vectors again, as one bulk addition would.

        The memory of removed vectors is freed at once (otherwise when a third of all rows is dead), and pages that
        grew by single additions become as good as built ones. Takes as long as a build; searches go on meanwhile.

        Parameters
        ----------
        threads, progress
            As for `add`.

        Raises
        ------
        CancelledError, ReadOnlyIndexError, MemoryError
            As for `add`; nothing has changed then.
        """
        self._core.compact(self._pool(threads), progress)

    def copy(self) -> Index:
        """Give an independent index with the same content that can be written to, also of a read-only one.

        Sealed pages are shared until either side drops them.
        """
        return self._of(self._core.copy(), self._threads, self.beam)

    def __copy__(self) -> Index:
        return self.copy()

    def __deepcopy__(self, memo: dict[int, object]) -> Index:
        return self.copy()

    def __reduce__(self) -> tuple[object, tuple[bytes, int | None]]:
        return _from_pickle, (self.to_bytes(), self._threads)

    def __repr__(self) -> str:
        kind = ", read_only=True" if self.read_only else ""
        return f"Index(dim={self.dim}, metric={self.metric!r}, dtype={self.dtype!r}, vectors={len(self)}{kind})"


def _from_pickle(data: bytes, threads: int | None) -> Index:
    return Index.from_bytes(data, threads=threads)
