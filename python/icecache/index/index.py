"""`Index`: a dynamic nearest-neighbour index whose leaves are pages of 16 vectors."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import numpy.typing as npt

from icecache import _core
from icecache.index.brute import Metric
from icecache.index.convert import as_ids, as_matrix
from icecache.index.pool import shared_pool
from icecache.index.result import SearchResult

Dtype = Literal["float32", "float16", "bfloat16"]
OnConflict = Literal["error", "replace", "skip"]
Missing = Literal["ignore", "error"]


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

    Notes
    -----
    **Concurrency.** Every method may be called from any thread at any time. A search loads one snapshot and then reads
    memory that no writer changes: it sees the state after some completed call of `add` or `remove`, never half of one.
    Once `add` or `remove` has returned, every later search in any thread sees it; a removed id is never returned again.
    Writers wait for each other per index, and `get`, `contains` and `save` wait for a running writer; `search` and
    `len` do not. The GIL is released while the core works.

    **Effort.** ``beam`` is the number of pages (16 vectors each) scored exactly per query. By default each query goes
    on until the vectors it has not looked at are expected to hold less than 1 in 40 of its k nearest, judged by how far
    the ones it has seen lie from their page's mean: few pages for clustered data, most of them for random directions.
    """

    __slots__ = ("_core", "_threads")

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
    ) -> Index:
        """Make an index of `vectors`, (n, dim); the same as `Index(dim, ...)` and one `add`.

        Raises
        ------
        ValueError, TypeError
            If `vectors` is not a matrix of finite numbers, or as `add`.
        """
        if np.ndim(vectors) != 2:
            msg = f"vectors: expected shape (n, dim), got {np.shape(vectors)}"
            raise ValueError(msg)
        index = cls(np.shape(vectors)[1], metric, dtype=dtype, center=center, seed=seed, threads=threads)
        index.add(vectors, ids)
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

    def add(
        self, vectors: npt.ArrayLike, ids: npt.ArrayLike | None = None, *, on_conflict: OnConflict = "error"
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
        """
        matrix, single = as_matrix(vectors, "vectors", self.dim)
        given = None if ids is None else as_ids(np.reshape(ids, -1) if single else ids)
        return self._core.add(shared_pool(self._threads), given, matrix, on_conflict)

    def search(
        self, queries: npt.ArrayLike, k: int = 10, *, beam: int | None = None, exact: bool = False
    ) -> SearchResult:
        """Find the `k` nearest vectors of each query.

        Parameters
        ----------
        queries : array_like, (n_queries, dim) or (dim,)
        k : int, default=10
            Neighbours per query. More than the index holds is fine: the rest is padded with -1 and +inf.
        beam : int, optional
            Pages scored exactly per query. Default: as many as this query needs (see the class).
        exact : bool, default=False
            Look at every vector.

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
        if beam is not None and beam < 1:
            msg = f"beam: expected at least 1 page, got {beam}"
            raise ValueError(msg)
        pool = shared_pool(self._threads) if len(matrix) > 1 else None
        ids, distances = self._core.search(pool, matrix, k, beam, exact)
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

    def get(self, ids: npt.ArrayLike) -> npt.NDArray[np.float32]:
        """Vectors by id, as they were given, to within the rounding of the dtype they are stored in.

        Returns
        -------
        float32 array, (n, dim), or (dim,) for one id

        Raises
        ------
        KeyError
            If an id is not in the index.
        """
        rows = self._core.get(as_ids(ids))
        return rows[0] if np.ndim(ids) == 0 else rows

    def contains(self, ids: npt.ArrayLike) -> npt.NDArray[np.bool_]:
        """Whether the index holds each id, bool (n,)."""
        return self._core.contains(as_ids(ids))

    def __contains__(self, vector_id: object) -> bool:
        if isinstance(vector_id, bool) or not isinstance(vector_id, (int, np.integer)):
            return False
        return 0 <= int(vector_id) < 2**63 and bool(self._core.contains(as_ids([int(vector_id)]))[0])

    def __len__(self) -> int:
        return len(self._core)

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
        index = cls.__new__(cls)
        index._core = _core.VectorIndex.from_bytes(shared_pool(threads), bytes(data))
        index._threads = threads
        return index

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

    def copy(self) -> Index:
        """Give an independent index with the same content; sealed pages are shared until either side drops them."""
        twin = type(self).__new__(type(self))
        twin._core = self._core.copy()
        twin._threads = self._threads
        return twin

    def __copy__(self) -> Index:
        return self.copy()

    def __deepcopy__(self, memo: dict[int, object]) -> Index:
        return self.copy()

    def __reduce__(self) -> tuple[object, tuple[bytes, int | None]]:
        return _from_pickle, (self.to_bytes(), self._threads)

    def __repr__(self) -> str:
        return f"Index(dim={self.dim}, metric={self.metric!r}, dtype={self.dtype!r}, vectors={len(self)})"


def _from_pickle(data: bytes, threads: int | None) -> Index:
    return Index.from_bytes(data, threads=threads)
