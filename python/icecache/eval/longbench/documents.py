"""Documents of a set, from the official files, from the parquet mirror (other field names), or from the hub."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from icecache.errors import DataError
from icecache.eval.data.hub import load_hub
from icecache.eval.data.rows import Row, read_rows
from icecache.eval.longbench.sets import LongBenchSet
from icecache.eval.task import DataDir

HUB: Final = "Xnhyacinth/LongBench"
"""Parquet mirror of THUDM/LongBench, whose own script new versions of `datasets` refuse to run."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text with one question.

    Parameters
    ----------
    context, question : str
        What the template's places are filled with.
    answers : tuple of str
        References.
    classes : tuple of str
        Of the classification sets.
    row : int
        Line or row in the data, from 1.
    """

    context: str
    question: str
    answers: tuple[str, ...]
    classes: tuple[str, ...]
    row: int


def file_names(name: str) -> tuple[str, ...]:
    """Where the documents of a set may lie in a data folder, official places first."""
    folders = ("data", "", "longbench", "longbench/data", "LongBench", "LongBench/data")
    stems = tuple(f"{folder}/{name}".lstrip("/") for folder in folders)
    return (
        *(f"{stem}.jsonl" for stem in stems),
        *(f"{stem}.parquet" for stem in stems),
        *(f"{stem}/test-00000-of-00001.parquet" for stem in stems),
        *stems,
    )


def documents(chosen: LongBenchSet, data: DataDir | None) -> Iterator[Document]:
    """Documents of a set in the order of the data.

    Parameters
    ----------
    chosen : LongBenchSet
        Which set.
    data : DataDir or None
        None: the hub.

    Raises
    ------
    DataError
        If the file is missing or a row has another form; the message has file, line and field.
    """
    if data is None:
        hint = f"or give --data-dir with data/{chosen.name}.jsonl of THUDM/LongBench"
        rows = load_hub(HUB, chosen.name, "test", hint=hint)
        yield from (parse_row(row, number, f"{HUB}/{chosen.name}") for number, row in enumerate(rows, 1))
        return
    try:
        path = data.find(*file_names(chosen.name))
    except DataError as error:
        msg = (
            f"{data.path} has no documents of {chosen.name}: expected data/{chosen.name}.jsonl of LongBench's data.zip"
        )
        raise DataError(msg) from error
    for number, row in read_rows(path):
        yield parse_row(row, number, str(path))


def parse_row(row: Row, number: int, where: str) -> Document:
    """Check and convert one row.

    Raises
    ------
    DataError
        If a field is missing or has another type.
    """

    def require(field: str, expected: str, *, holds: bool) -> None:
        if not holds:
            got = type(row[field]).__name__ if field in row else "nothing"
            msg = f"{where}:{number}: field {field!r} must be {expected}, got {got}"
            raise DataError(msg)

    context, question = row.get("context"), row.get("input", row.get("question"))
    answers, classes = row.get("answers"), row.get("all_classes") or []
    answers = [answers] if isinstance(answers, str) else answers
    require("context", "text", holds=isinstance(context, str))
    require("question" if "question" in row else "input", "text", holds=isinstance(question, str))
    require("answers", "a list of one or more texts", holds=bool(answers) and is_texts(answers))
    require("all_classes", "a list of texts or null", holds=is_texts(classes))
    return Document(str(context), str(question), _texts(answers), _texts(classes), number)


def is_texts(value: object) -> bool:
    """Whether it is a list of texts."""
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _texts(value: object) -> tuple[str, ...]:
    assert isinstance(value, list)
    return tuple(value)
