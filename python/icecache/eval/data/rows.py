"""Rows of a data file: JSON lines, parquet, or a folder that `datasets.save_to_disk` wrote."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypeAlias

from icecache.errors import DataError

Row: TypeAlias = Mapping[str, object]


def read_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Rows with their numbers, counted from 1 (lines, for JSON lines; empty lines count but are left out).

    Parameters
    ----------
    path : Path
        A file `*.jsonl` or `*.parquet`, or a folder with parquet files or with a saved data set.

    Raises
    ------
    DataError
        If the file cannot be read as what its name says; the message has the line.
    """
    if path.is_dir():
        return _saved(path) if any(path.rglob("*.arrow")) else _parquet_folder(path)
    if path.suffix == ".parquet":
        return _parquet(path, 1)
    if path.suffix == ".jsonl":
        return _json_lines(path)
    msg = f"{path} must end in .jsonl or .parquet, or be a folder of datasets.save_to_disk"
    raise DataError(msg)


def parse_line(line: str, number: int, path: Path) -> Row:
    """Read one line of JSON lines.

    Raises
    ------
    DataError
        If it is no JSON object.
    """
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        msg = f"{path}:{number}: not JSON: {error}"
        raise DataError(msg) from error
    if not isinstance(row, dict):
        msg = f"{path}:{number}: expected a JSON object, got {type(row).__name__}"
        raise DataError(msg)
    return row


def _json_lines(path: Path) -> Iterator[tuple[int, Row]]:
    for number, line in text_lines(path):
        yield number, parse_line(line, number, path)


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not empty, with their numbers from 1.

    Raises
    ------
    DataError
        If the file is not UTF-8.
    """
    with path.open(encoding="utf-8") as file:
        try:
            yield from ((number, line) for number, line in enumerate(file, 1) if line.strip())
        except UnicodeDecodeError as error:
            msg = f"{path} is not UTF-8: {error}"
            raise DataError(msg) from error


def _parquet_folder(path: Path) -> Iterator[tuple[int, Row]]:
    files = sorted(path.glob("*.parquet"))
    if not files:
        msg = f"{path} holds neither parquet files nor a data set saved by datasets.save_to_disk"
        raise DataError(msg)
    start = 1
    for file in files:
        for number, row in _parquet(file, start):
            yield number, row
            start = number + 1


def _parquet(path: Path, start: int) -> Iterator[tuple[int, Row]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        msg = f"reading {path} needs `pip install icecache[eval]`"
        raise DataError(msg) from error
    try:
        for batch in ParquetFile(path).iter_batches(batch_size=64):
            for row in batch.to_pylist():
                yield start, row
                start += 1
    except (ArrowException, OSError) as error:
        msg = f"{path} is no parquet file: {error}"
        raise DataError(msg) from error


def _saved(path: Path) -> Iterator[tuple[int, Row]]:
    try:
        from datasets import DatasetDict, load_from_disk
    except ImportError as error:
        msg = f"reading {path} needs `pip install icecache[eval]`"
        raise DataError(msg) from error
    try:
        saved = load_from_disk(str(path))
    except Exception as error:  # whatever `datasets` raises for a folder that it does not know
        msg = f"{path} is no data set saved by datasets.save_to_disk: {error}"
        raise DataError(msg) from error
    if isinstance(saved, DatasetDict):
        if "test" not in saved:
            msg = f"{path} has the splits {', '.join(saved)}, expected one named test"
            raise DataError(msg)
        saved = saved["test"]
    yield from enumerate(saved, 1)
