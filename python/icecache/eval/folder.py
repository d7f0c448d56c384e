"""The folder of a run: records as they come, the manifest beside them, and going on where a run stopped."""

from __future__ import annotations

import errno
import gzip
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Final, TextIO, cast

from icecache.errors import ConfigError, DataError
from icecache.eval.record import Key, Manifest, Record

SAMPLES, MANIFEST = "samples.jsonl", "manifest.json"
SPARE_BYTES: Final = 1 << 20
"""A run does not start with less room than this on the disk."""


def read_records(folder: Path) -> Iterator[Record]:
    """Read the records of a folder, in the order they were written; a last line that was torn by a kill is left out.

    A folder that is kept for reading may hold them compressed, as ``samples.jsonl.gz``.

    Raises
    ------
    DataError
        If there are none, or a line before the last is no record; the message names file and line.
    """
    path, packed = folder / SAMPLES, folder / f"{SAMPLES}.gz"
    if not path.is_file() and not packed.is_file():
        msg = f"{folder} holds no {SAMPLES}: not the folder of a run"
        raise DataError(msg)
    with _opened(path, packed) as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                return
            try:
                yield Record.from_json(line)
            except DataError as error:
                msg = f"{path}, line {number}: {error}"
                raise DataError(msg) from error


def _opened(path: Path, packed: Path) -> TextIO:
    if path.is_file():
        return path.open(encoding="utf-8", newline="\n")
    return cast("TextIO", gzip.open(packed, "rt", encoding="utf-8", newline="\n"))


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a folder.

    Raises
    ------
    DataError
        If there is none, or it is of another version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        msg = f"{folder} holds no {MANIFEST}: not the folder of a run"
        raise DataError(msg)
    try:
        return Manifest.from_json(path.read_text(encoding="utf-8"))
    except DataError as error:
        msg = f"{path}: {error}"
        raise DataError(msg) from error


def check_folder(path: Path, *, resume: bool) -> None:
    """Refuse a folder that a run could not write to, before anything else takes time.

    Raises
    ------
    ConfigError
        If there are records and `resume` is false.
    DataError
        If the folder cannot be made or written, or the disk is full.
    """
    with _write_errors(path):
        path.mkdir(parents=True, exist_ok=True)
        _check_room(path)
    if not resume and _has_records(path):
        msg = f"--out {path} holds records already: add --resume to go on with them, or name another folder"
        raise ConfigError(msg)


def merge_folders(folders: Sequence[Path], out: Path) -> int:
    """Put the records of several runs into one folder; returns how many there are.

    Of records with the same task, sample, arm and setup the first stays.

    Parameters
    ----------
    folders : sequence of Path
        Runs of the same model with the same settings.
    out : Path
        Made; holds no records yet.

    Raises
    ------
    ConfigError
        If the runs differ in what resuming would refuse, or `out` holds records.
    DataError
        If a folder holds no run, or `out` cannot be written.
    """
    manifest = read_manifest(folders[0])
    for folder in folders[1:]:
        manifest = _joined(manifest, read_manifest(folder), "eval merge", folder)
    with RunFolder(out, manifest, resume=False) as run:
        for folder in folders:
            run.add(read_records(folder))
    return len(run.done)


class RunFolder:
    """A folder that a run writes to. Every batch is on the disk when `add` returns.

    Parameters
    ----------
    path : Path
        Made if missing.
    manifest : Manifest
        Of this start; its parts are put behind those of earlier starts.
    resume : bool
        Whether records that are there already may stay.

    Attributes
    ----------
    done : set of Key
        Records that are there.

    Raises
    ------
    ConfigError
        If there are records and `resume` is false, or they were made otherwise.
    DataError
        If the folder cannot be written, or its files cannot be read.
    """

    def __init__(self, path: Path, manifest: Manifest, *, resume: bool) -> None:
        self.path = path
        self.done: set[Key] = set()
        check_folder(path, resume=resume)
        if _has_records(path):
            manifest = _joined(read_manifest(path), manifest, "--resume", path)
            self.done = {record.key for record in read_records(path)}
        self.manifest = manifest
        with _write_errors(path):
            self._mend()
            self._write_manifest()
            self._file = (path / SAMPLES).open("a", encoding="utf-8", newline="\n")

    def _mend(self) -> None:
        """Cut off a torn last line, so that the next record starts a line."""
        path = self.path / SAMPLES
        if not _has_records(self.path):
            return
        with path.open("rb+") as file:
            content = file.read()
            file.truncate(content.rfind(b"\n") + 1)

    def _write_manifest(self) -> None:
        # By a rename: a kill in between leaves the old one.
        draft = self.path / f"{MANIFEST}.new"
        draft.write_text(self.manifest.to_json(), encoding="utf-8")
        draft.replace(self.path / MANIFEST)

    def add(self, records: Iterable[Record]) -> None:
        """Append records that are not there yet.

        Raises
        ------
        DataError
            If the disk is full or fails; what was written before stays, and `--resume` goes on from it.
        """
        new = [record for record in records if record.key not in self.done]
        with _write_errors(self.path, len(self.done)):
            self._file.write("".join(f"{record.to_json()}\n" for record in new))
            self._file.flush()
            os.fsync(self._file.fileno())
        self.done.update(record.key for record in new)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._file.close()
        except OSError:
            if error is None:  # the first error tells more than that its rest could not be written either
                raise


class _write_errors:  # noqa: N801 - reads as the verb it is
    """Turn an OSError of the block into a DataError that says what to do."""

    def __init__(self, path: Path, n_safe: int | None = None) -> None:
        self.path, self.n_safe = path, n_safe

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(error, OSError):
            return
        what = "the disk is full" if error.errno in {errno.ENOSPC, errno.EDQUOT} else str(error)
        kept = "" if self.n_safe is None else f"; {self.n_safe} records are safe: make room and run it with --resume"
        msg = f"cannot write to {self.path}: {what}{kept}"
        raise DataError(msg) from error


def _has_records(path: Path) -> bool:
    samples = path / SAMPLES
    return samples.exists() and samples.stat().st_size > 0


def _check_room(path: Path) -> None:
    probe = path / ".probe"
    try:
        with probe.open("wb") as file:
            file.write(bytes(SPARE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    finally:
        probe.unlink(missing_ok=True)


def _joined(earlier: Manifest, now: Manifest, verb: str, path: Path) -> Manifest:
    """Join the manifests of records that were made the same way."""
    keys = [*dict.fromkeys([*earlier.identity, *now.identity])]
    differing = [
        f"{key} was {json.dumps(earlier.identity.get(key))}, now {json.dumps(now.identity.get(key))}"
        for key in keys
        if earlier.identity.get(key) != now.identity.get(key)
    ]
    differing += [
        f"data file {name} has changed" for name, digest in now.data.items() if earlier.data.get(name, digest) != digest
    ]
    if differing:
        msg = f"{verb}: the records in {path} were made otherwise: {'; '.join(differing)}. Name another --out"
        raise ConfigError(msg)
    return replace(
        now,
        data={**earlier.data, **now.data},
        labels={**earlier.labels, **now.labels},
        metrics={**earlier.metrics, **now.metrics},
        parts=(*earlier.parts, *now.parts),
    )
