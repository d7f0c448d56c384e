"""Problems from `test.jsonl`, from parquet, or from the hub."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from icecache.errors import DataError
from icecache.eval.data.hub import load_hub
from icecache.eval.data.rows import Row, read_rows
from icecache.eval.gsm8k.grade import AUTHORS_NUMBER
from icecache.eval.task import DataDir

HUB: Final = "openai/gsm8k"
FILES: Final = (
    *("gsm8k/test.jsonl", "gsm8k_test.jsonl", "grade_school_math/data/test.jsonl", "test.jsonl"),
    *("main/test-00000-of-00001.parquet", "gsm8k/main/test-00000-of-00001.parquet", "gsm8k/test.parquet", "gsm8k"),
)
SEPARATOR: Final = "####"


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem and its result, the number behind "####".

    Parameters
    ----------
    question, result : str
        Text and number.
    row : int
        Line or row in the data, from 1.
    """

    question: str
    result: str
    row: int


def problems(data: DataDir | None) -> Iterator[Problem]:
    """Problems of the test set in the order of the data.

    Raises
    ------
    DataError
        If the file is missing or a row has another form.
    """
    if data is None:
        rows = load_hub(HUB, "main", "test", hint=f"or give --data-dir with {FILES[0]}")
        yield from (parse_row(row, number, HUB) for number, row in enumerate(rows, 1))
        return
    path = data.find(*FILES)
    for number, row in read_rows(path):
        yield parse_row(row, number, str(path))


def parse_row(row: Row, number: int, where: str) -> Problem:
    """Check and convert one row.

    Raises
    ------
    DataError
        If a field is missing, or the answer has no number behind "####".
    """
    question, answer = row.get("question"), row.get("answer")
    if not isinstance(question, str) or not isinstance(answer, str):
        fields = ", ".join(map(str, row)) or "none"
        msg = f"{where}:{number}: expected the fields question and answer as text, got {fields}"
        raise DataError(msg)
    _, mark, result = answer.rpartition(SEPARATOR)
    if not mark or not AUTHORS_NUMBER.search(result):
        msg = f"{where}:{number}: the answer must end in '#### NUMBER', got {answer[-40:]!r}"
        raise DataError(msg)
    return Problem(question, result.strip(), number)
