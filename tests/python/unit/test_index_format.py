"""The file of an index: every damage is found, nothing in it is trusted."""

from __future__ import annotations

import errno
import io
import os
import resource
import signal
import struct
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from icecache.errors import IceCacheError, IndexFormatError
from icecache.index import Index

HEADER, ENTRY = 32, 32
METRICS, DTYPES = ("ip", "l2", "cosine"), ("float32", "float16", "bfloat16", "int8")
#: Files of released versions: one per metric and dtype, from `write_golden_files`.
GOLDEN = Path(__file__).parents[2] / "golden"


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
    copied = [Index.load(path), Index.load(str(path)), Index.load(io.BytesIO(stream.getvalue()))]
    mapped = [Index.load(path, mmap=True), Index.load(path, mmap=True, verify=True)]
    for twin in copied + mapped:
        twin.validate()
        assert (twin.dim, twin.metric, twin.dtype, len(twin)) == (12, metric, dtype, len(index))
        for left, right in zip(index.search(queries, 9, exact=True), twin.search(queries, 9, exact=True), strict=True):
            np.testing.assert_array_equal(left, right)
        assert twin.to_bytes() == index.to_bytes()
        assert twin.read_only == (twin in mapped)
        twin = twin.copy() if twin.read_only else twin
        assert twin.add(np.ones(12)).tolist() == [3 * n + 3 if n else 0], "ids go on where they were"
        twin.validate()


def test_saving_over_a_file_replaces_it_whole(tmp_path):
    path = tmp_path / "vectors.icex"
    an_index(n=3000).save(path)
    small = an_index(n=3)
    small.save(path)
    assert path.read_bytes() == small.to_bytes()


def test_a_failed_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "vectors.icex"
    path.write_bytes(b"old")
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limit[1]))  # the disk is full, so to speak
        with pytest.raises(OSError, match="large") as raised:
            an_index(n=300).save(path)
        assert raised.value.errno == errno.EFBIG
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    assert path.read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(FileNotFoundError):
        an_index(n=3).save(tmp_path / "missing" / "index.ice")
    with pytest.raises(OSError, match="file name"):
        an_index(n=3).save("/")


def test_saving_to_a_link_keeps_the_link(tmp_path):
    index, path, link = an_index(n=30), tmp_path / "behind" / "vectors.icex", tmp_path / "link"
    link.symlink_to("behind/vectors.icex")
    path.parent.mkdir()
    for _ in range(2):  # the first time nothing is there yet
        index.save(link)
        assert link.is_symlink()
        assert path.read_bytes() == index.to_bytes()
    circle = tmp_path / "circle"
    circle.symlink_to("circle")
    index.save(circle)  # leads nowhere, so it is replaced as any file
    assert circle.read_bytes() == index.to_bytes()


def test_saving_to_a_pipe_writes_to_it(tmp_path):
    pipe, index, read = tmp_path / "pipe", an_index(n=30), []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()), daemon=True)
    reader.start()
    index.save(pipe)
    reader.join()
    assert read == [index.to_bytes()]
    assert pipe.is_fifo()


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
    struct.pack_into("<H", other, 4, 3)
    with pytest.raises(IndexFormatError, match="version 3"):
        Index.from_bytes(other)


def test_a_format_error_is_a_value_error_and_one_of_ours():
    assert issubclass(IndexFormatError, ValueError)
    assert issubclass(IndexFormatError, IceCacheError)


def test_a_saved_file_has_the_permissions_of_any_new_file(tmp_path):
    Index(4).save(tmp_path / "index.ice")
    (tmp_path / "ordinary").write_bytes(b"")
    assert (tmp_path / "index.ice").stat().st_mode == (tmp_path / "ordinary").stat().st_mode
    assert sorted(p.name for p in tmp_path.iterdir()) == ["index.ice", "ordinary"]


def test_a_mapped_file_is_checked_but_for_its_vectors(tmp_path):
    file = an_index().to_bytes()
    place = sections(file)
    keys, length = place[b"KEYS"]
    path = tmp_path / "index.ice"
    for at in [*range(0, 500, 3), *range(500, len(file), 977)]:
        damaged = bytearray(file)
        damaged[at] ^= 1 << at % 8
        path.write_bytes(damaged)
        with pytest.raises(IndexFormatError):
            Index.load(path, mmap=True, verify=True)
        if not keys <= at < keys + length:
            with pytest.raises(IndexFormatError):
                Index.load(path, mmap=True)
        else:
            Index.load(path, mmap=True).search(np.ones(12), 5)
    for end in (0, 1, 31, 32, 500, keys, len(file) - 1):
        path.write_bytes(file[:end])
        with pytest.raises(IndexFormatError):
            Index.load(path, mmap=True)


def test_mapping_leaves_the_vectors_in_the_file(tmp_path):
    data = np.random.default_rng(0).standard_normal((20_000, 64), dtype=np.float32)
    index = Index.build(data)
    path = tmp_path / "index.ice"
    index.save(path)
    mapped = Index.load(path, mmap=True)
    assert mapped.stats()["page_bytes"] < index.stats()["page_bytes"] / 20
    assert mapped.nbytes() < data.nbytes / 5
    # A mapped index has no codes (they would be made from all vectors), so only exact searches agree.
    expected = index.search(data[:30], 10, exact=True)
    found = mapped.search(data[:30], 10, exact=True)
    np.testing.assert_array_equal(found.ids, expected.ids)
    index.remove(np.arange(10_000))
    index.save(path)  # a new file; the mapping keeps the old one
    np.testing.assert_array_equal(mapped.search(data[:30], 10, exact=True).ids, expected.ids)
    assert len(Index.load(path, mmap=True)) == 10_000
    with pytest.raises(ValueError, match="path"):
        Index.load(io.BytesIO(path.read_bytes()), mmap=True)
    with pytest.raises(FileNotFoundError):
        Index.load(tmp_path / "none.ice", mmap=True)


def test_a_pickle_can_hand_its_bytes_over_without_a_copy():
    import pickle

    index = an_index()
    index.beam = 7
    buffers: list[pickle.PickleBuffer] = []
    small = pickle.dumps(index, protocol=5, buffer_callback=buffers.append)
    assert len(small) < 300
    assert len(buffers) == 1
    for twin in (
        pickle.loads(small, buffers=buffers),
        *(pickle.loads(pickle.dumps(index, protocol=protocol)) for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)),
    ):
        assert twin.to_bytes() == index.to_bytes()
        assert twin.beam == 7


def golden_index(metric: str, dtype: str) -> Index:
    """Numbers that every dtype holds exactly, so that files do not depend on the machine."""
    rows = ((np.arange(1100)[:, None] * 7 + np.arange(6) * 13) % 23 - 11).astype(np.float32)
    index = Index(6, metric, dtype=dtype, center=metric == "l2", seed=3)
    index.add(rows, ids=np.arange(1100) * 2)
    index.remove(np.arange(0, 40, 4))
    return index


def write_golden_files() -> None:
    """Run once per released version: `python -c "from test_index_format import *; write_golden_files()"`."""
    for metric in METRICS:
        for dtype in DTYPES:
            golden_index(metric, dtype).save(GOLDEN / f"v2-{metric}-{dtype}.ice")


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_file_of_a_released_version_is_read(metric, dtype):
    expected = golden_index(metric, dtype)
    path = GOLDEN / f"v2-{metric}-{dtype}.ice"
    ids = np.array([i for i in range(0, 2200, 2) if i in expected])
    queries = np.linspace(-1, 1, 18).reshape(3, 6)
    for index in (Index.load(path), Index.load(path, mmap=True)):
        assert (index.metric, index.dtype, len(index)) == (metric, dtype, len(ids))
        np.testing.assert_array_equal(index.get(ids), expected.get(ids))
        found, truth = index.search(queries, 9, exact=True), expected.search(queries, 9, exact=True)
        np.testing.assert_allclose(found.distances, truth.distances, rtol=1e-6, atol=1e-6)
