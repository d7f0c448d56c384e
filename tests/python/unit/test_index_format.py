"""The file of an index: every damage is found, nothing in it is trusted."""

from __future__ import annotations

import io
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from icecache.errors import IceCacheError, IndexFormatError
from icecache.index import Index

HEADER, ENTRY = 32, 32
METRICS, DTYPES = ("ip", "l2", "cosine"), ("float32", "float16", "bfloat16")


def an_index(metric: str = "cosine", dtype: str = "float16", n: int = 1200) -> Index:
    index = Index(12, metric, dtype=dtype, seed=7)
    index.add(np.random.default_rng(0).standard_normal((n, 12)) + 1, ids=np.arange(n) * 3 + 5)
    index.remove(np.arange(100, 400))
    return index


FILE = an_index(n=300).to_bytes()


def sections(file: bytes) -> dict[bytes, tuple[int, int]]:
    """Offset and length of each section by tag."""
    (n,) = struct.unpack_from("<I", file, 12)
    entries = [struct.unpack_from("<4sIQQQ", file, HEADER + ENTRY * i) for i in range(n)]
    return {tag: (offset, length) for tag, _, offset, length, _ in entries}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("n", [0, 1, 300, 3000])
def test_a_saved_index_comes_back_as_it_was(metric, dtype, n, tmp_path):
    index = an_index(metric, dtype, n)
    path = tmp_path / "vectors.icex"
    index.save(path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["vectors.icex"], "no temporary file stays"
    stream = io.BytesIO()
    index.save(stream)
    queries = np.random.default_rng(1).standard_normal((5, 12))
    for twin in (Index.load(path), Index.load(str(path)), Index.load(io.BytesIO(stream.getvalue()))):
        twin.validate()
        assert (twin.dim, twin.metric, twin.dtype, len(twin)) == (12, metric, dtype, len(index))
        for left, right in zip(index.search(queries, 9, exact=True), twin.search(queries, 9, exact=True), strict=True):
            np.testing.assert_array_equal(left, right)
        assert twin.to_bytes() == index.to_bytes()
        assert twin.add(np.ones(12)).tolist() == [3 * n + 3 if n else 0], "ids go on where they were"


def test_saving_over_a_file_replaces_it_whole(tmp_path):
    path = tmp_path / "vectors.icex"
    an_index(n=3000).save(path)
    small = an_index(n=3)
    small.save(path)
    assert path.read_bytes() == small.to_bytes()


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "vectors.icex"
    path.write_bytes(b"old")
    monkeypatch.setattr("os.fsync", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        an_index(n=3).save(path)
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1


def test_every_truncation_is_found():
    edges = {edge for offset, length in sections(FILE).values() for edge in (offset, offset + length)}
    near = {edge + step for edge in edges | {0, 4, 16, 24, HEADER, HEADER + ENTRY} for step in (-1, 0, 1)}
    for end in sorted(end for end in near if 0 <= end < len(FILE)):
        with pytest.raises(IndexFormatError):
            Index.from_bytes(FILE[:end])
    with pytest.raises(IndexFormatError, match="bytes"):
        Index.from_bytes(FILE + b"\0")


def test_every_changed_byte_is_found():
    """All of the header and table, and every seventh byte behind them."""
    table_end = min(offset for offset, _ in sections(FILE).values())
    for at in [*range(table_end), *range(table_end, len(FILE), 7)]:
        damaged = bytearray(FILE)
        damaged[at] ^= 1 << at % 8
        with pytest.raises(IndexFormatError):
            Index.from_bytes(damaged)


@given(st.lists(st.tuples(st.integers(0, len(FILE) - 1), st.integers(1, 255)), min_size=1, max_size=20))
def test_random_damage_is_found(changes):
    damaged = bytearray(FILE)
    for at, flip in changes:
        damaged[at] ^= flip
    if bytes(damaged) == FILE:
        return
    with pytest.raises(IndexFormatError):
        Index.from_bytes(damaged)


@given(st.binary(max_size=400))
def test_foreign_bytes_are_refused(data):
    for file in (data, b"ICEX" + data):
        with pytest.raises(IndexFormatError):
            Index.from_bytes(file)


def test_another_version_is_named():
    other = bytearray(FILE)
    struct.pack_into("<H", other, 4, 2)
    with pytest.raises(IndexFormatError, match="version 2"):
        Index.from_bytes(other)


def test_a_format_error_is_a_value_error_and_one_of_ours():
    assert issubclass(IndexFormatError, ValueError)
    assert issubclass(IndexFormatError, IceCacheError)


def test_a_saved_file_has_the_permissions_of_any_new_file(tmp_path):
    Index(4).save(tmp_path / "index.ice")
    (tmp_path / "ordinary").write_bytes(b"")
    assert (tmp_path / "index.ice").stat().st_mode == (tmp_path / "ordinary").stat().st_mode
    assert sorted(p.name for p in tmp_path.iterdir()) == ["index.ice", "ordinary"]
