"""`Index`: a dynamic nearest-neighbour index whose leaves are pages of 16 vectors."""

from __future__ import annotations

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import numpy.typing as npt

from icecache import _core
from icecache.index.brute import Metric
from icecache.index.check import as_count, one_of
from icecache.index.convert import as_ids, as_matrix, as_rows, from_tensor
from icecache.index.pool import shared_pool
from icecache.index.reading import Reading

Dtype = Literal["float32", "float16", "bfloat16", "int8"]
OnConflict = Literal["error", "replace", "skip"]
Missing = Literal["ignore", "error"]
#: Told (vectors done, vectors in all) now and then; `False` cancels the call.
Progress = Callable[[int, int], "bool | None"]


class Index(Reading):
    """Maximum inner product, squared L2 or cosine search over vectors that come and go.

    Parameters
    ----------
    dim : int
        Length of a vector.
    metric : {"ip", "l2", "cosine"}, default="ip"
        Distance, always smaller = closer: minus the inner product, squared L2, 1 - cosine.
    dtype : {"float32", "float16", "bfloat16", "int8"}, default="float32"
        How vectors are stored, after the mean was taken out. Queries and sums stay in float32. ``int8`` keeps one scale
        per vector: every element is off by at most 1/254 of the vector's largest element.
    center : bool, default=True
        Subtract the mean of the first 1024 or more vectors before storing. The ranking does not change (for ``ip``
        every score moves by the same constant), distances are reported for the vectors as given; pages get better
        because keys with a large common part look alike otherwise.
    seed : int, default=0
        Start of the ordering of bulk additions. Same seed, same calls: same index, whatever the number of threads.
    codes : bool, default=True
        Keep 4-bit codes of the vectors, dim / 8 and at most 32 bytes each, from 4096 vectors of 32 dimensions on.
        Searches are several times faster with them.
    threads : int, optional
        Worker threads for bulk additions and query batches. Default: ``ICECACHE_NUM_THREADS`` or the cores this process
        may use. One query never uses more than one thread.

    Attributes
    ----------
    beam : int or None
        Pages of 16 vectors scored exactly per query where a search does not say otherwise. Default None: each query
        goes on until no page it has not looked at promises one of its k nearest.

    Notes
    -----
    **Concurrency.** Every method may be called from any thread at any time. A call that reads sees one snapshot: the
    state after some completed write, never half of one. Once `add` or `remove` has returned, every later call in any
    thread sees it; a removed id is never returned again. Readers never wait for writers. Writers of one index wait for
    each other. The GIL is released while the core works. `docs/index/concurrency.md` has the whole contract.
    """

    __slots__ = ()

    def __init__(
        self,
        dim: int,
        metric: Metric = "ip",
        *,
        dtype: Dtype = "float32",
        center: bool = True,
        seed: int = 0,
        codes: bool = True,
        threads: int | None = None,
    ) -> None:
        if threads is not None:
            threads = as_count(threads, "threads", 1)
        one_of(metric, "metric", ("ip", "l2", "cosine"))
        one_of(dtype, "dtype", ("float32", "float16", "bfloat16", "int8"))
        self._core = _core.VectorIndex(dim, metric, dtype, center, seed, codes)
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
        queries: npt.ArrayLike | None = None,
        dtype: Dtype = "float32",
        center: bool = True,
        seed: int = 0,
        codes: bool = True,
        threads: int | None = None,
        progress: Progress | None = None,
    ) -> Index:
        """Make an index of `vectors`, (n, dim); the same as `Index(dim, ...)` and one `add`.

        With `queries`, (m, dim), also `set_sample` and `calibrate`: 256 of them are kept and tell what a recall takes.

        Raises
        ------
        ValueError, TypeError, CancelledError
            If `vectors` is not a matrix of finite numbers, or as `add`.
        """
        shape = np.shape(from_tensor(vectors, "vectors"))
        if len(shape) != 2:
            msg = f"vectors: expected shape (n, dim), got {shape}"
            raise ValueError(msg)
        index = cls(shape[1], metric, dtype=dtype, center=center, seed=seed, codes=codes, threads=threads)
        sample = None if queries is None else as_matrix(queries, "queries", shape[1])[0]
        index.add(vectors, ids, progress=progress)
        if sample is not None:
            index._core.set_sample(sample)
            index.calibrate()
        return index

    def set_sample(self, queries: npt.ArrayLike) -> None:
        """Take queries, (m, dim), as a sample of those to come: ``search(..., recall=...)`` goes by what they need.

        256 of them at equal distances are kept, with the index and in its files, in place of any before. An empty array
        drops them: stored vectors stand for queries again. Nothing is measured before `calibrate` or a search for a
        recall. For ``ip`` give real queries: stored vectors ask other things than queries do.

        Raises
        ------
        ValueError, TypeError
            Wrong shape or dtype, NaN or infinity (the message names the row).
        ReadOnlyIndexError
            A snapshot or a mapped file.
        """
        self._core.set_sample(as_matrix(queries, "queries", self.dim)[0])

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
        one_of(on_conflict, "on_conflict", ("error", "replace", "skip"))
        if progress is not None and not callable(progress):
            msg = f"progress: expected a callable, got {progress!r}"
            raise TypeError(msg)
        given = None if ids is None else as_ids(np.reshape(from_tensor(ids, "ids"), -1) if single else ids)
        return self._core.add(self._pool(threads), given, rows, on_conflict, progress)

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
        one_of(missing, "missing", ("ignore", "error"))
        return self._core.remove(shared_pool(self._threads), as_ids(ids), missing == "error")

    def to_bytes(self) -> bytes:
        """Give the index as one checksummed, little-endian byte string (the contents of a saved file)."""
        return self._core.to_bytes()

    @classmethod
    def from_bytes(
        cls, data: bytes | bytearray | memoryview | npt.NDArray[np.uint8], *, threads: int | None = None
    ) -> Index:
        """Make an index from what `to_bytes` gave. Every byte is checked, rows are copied, nothing is packed again.

        Raises
        ------
        IndexFormatError
            Not an index, cut short, corrupted, or of another version.
        """
        file = np.frombuffer(data, np.uint8)
        return cls._of(_core.VectorIndex.from_bytes(shared_pool(threads), file), threads)

    def save(self, file: str | os.PathLike[str] | BinaryIO) -> None:
        """Write one snapshot to a path (a new file, synced, then renamed over the old one) or to an open binary file.

        A symbolic link is followed and stays; a device or a pipe is written to.

        Rows of removed vectors that were not reclaimed yet are part of the file; `compact` drops them.

        Raises
        ------
        OSError
            If the file cannot be written; an old file at the path is then as it was.
        """
        if isinstance(file, (str, os.PathLike)):
            self._core.save(file)
        elif hasattr(file, "write"):
            file.write(self.to_bytes())
        else:
            msg = f"file: expected a path or an open binary file, got {file!r}"
            raise TypeError(msg)

    @classmethod
    def load(
        cls,
        file: str | os.PathLike[str] | BinaryIO,
        *,
        mmap: bool = False,
        verify: bool = False,
        threads: int | None = None,
    ) -> Index:
        """Read what `save` wrote.

        Parameters
        ----------
        file : path or binary file
        mmap : bool, default=False
            Map the file at a path and leave the vectors in it: a read-only index that is there at once and whose
            memory the system shares between processes. The file must not change meanwhile (`save` to the same path is
            fine: it makes a new file). `copy` gives an index that can be written to.
        verify : bool, default=False
            With `mmap`, read and check the vectors too. Without `mmap` everything is always checked.
        threads : int, optional
            As for the constructor.

        Raises
        ------
        IndexFormatError
            Not an index, cut short, corrupted, or of another version.
        OSError
            If the file cannot be read.
        ValueError
            `mmap` of a file object.
        """
        path = file if isinstance(file, (str, os.PathLike)) else None
        if mmap:
            if path is None:
                msg = f"file: expected a path to map, got {type(file).__name__}"
                raise ValueError(msg)
            return cls._of(_core.VectorIndex.open_mapped(shared_pool(threads), path, verify), threads)
        if path is None and not hasattr(file, "read"):
            msg = f"file: expected a path or an open binary file, got {file!r}"
            raise TypeError(msg)
        data = Path(path).read_bytes() if path is not None else file.read()  # type: ignore[union-attr]
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

    def __reduce_ex__(self, protocol: object) -> tuple[object, tuple[object, int | None, int | None, type[Index]]]:
        # Protocol 5 can hand the bytes over without a copy (`buffer_callback`).
        out_of_band = isinstance(protocol, int) and protocol >= 5
        data = self.to_bytes()
        return _from_pickle, (pickle.PickleBuffer(data) if out_of_band else data, self._threads, self.beam, type(self))

    def __repr__(self) -> str:
        kind = ", read_only=True" if self.read_only else ""
        return f"Index(dim={self.dim}, metric={self.metric!r}, dtype={self.dtype!r}, vectors={len(self)}{kind})"


def _from_pickle(data: bytes | memoryview, threads: int | None, beam: int | None, kind: type[Index] = Index) -> Index:
    index = kind.from_bytes(data, threads=threads)
    index.beam = beam
    return index
