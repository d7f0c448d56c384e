"""`icecache eval data check`: which official files a folder holds, whether they are whole, and what they hash to."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, get_args

from icecache.errors import DataError
from icecache.eval.data.rows import Row, parse_line, read_rows, text_lines
from icecache.eval.gsm8k import problems as gsm8k
from icecache.eval.gsm8k.task import PROMPT_FILE
from icecache.eval.longbench.documents import file_names, parse_row
from icecache.eval.longbench.sets import SETS
from icecache.eval.ruler.documents import HOTPOT_FILES, SQUAD_FILES, hotpot, squad
from icecache.eval.ruler.haystack import ESSAY_FILES, essays
from icecache.eval.task import DataDir

Status = Literal["ok", "other count", "broken", "missing"]
MOST_ERRORS: Final = 20
"""Errors listed of a file; the number of all is given."""
GSM8K_COUNT: Final = 1319
SQUAD_COUNT: Final = 5928
HOTPOT_COUNT: Final = 7405
PROMPT_LINES: Final = 126


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found of one official file.

    Parameters
    ----------
    suite, name : str
        Where it belongs.
    status : {"ok", "other count", "broken", "missing"}
        "other count": readable, but not as many rows as published.
    path : str
        Relative to the folder; where it should be, if missing.
    count, expected : int
        Rows that are right, and published ones.
    hashes : tuple of (str, str)
        File and SHA-256.
    errors : tuple of str
        The first ones, with line numbers.
    n_errors : int
        All.
    """

    suite: str
    name: str
    status: Status
    path: str
    count: int
    expected: int
    hashes: tuple[tuple[str, str], ...] = ()
    errors: tuple[str, ...] = ()
    n_errors: int = 0


@dataclass(frozen=True, slots=True)
class _Official:
    suite: str
    name: str
    files: tuple[str, ...]
    expected: int
    # Gives an error's text, or None, for each row.
    rows: Callable[[Path, DataDir], Iterator[str | None]]


def _each_row(parse: Callable[[Row, int, str], object]) -> Callable[[Path, DataDir], Iterator[str | None]]:
    def errors(path: Path, _: DataDir) -> Iterator[str | None]:
        if path.suffix == ".jsonl":
            for number, line in text_lines(path):
                yield _error(functools.partial(_parse_text, parse, line, number, path))
        else:
            for number, row in read_rows(path):
                yield _error(functools.partial(parse, row, number, str(path)))

    return errors


def _parse_text(parse: Callable[[Row, int, str], object], line: str, number: int, path: Path) -> object:
    return parse(parse_line(line, number, path), number, str(path))


def _error(action: Callable[[], object]) -> str | None:
    try:
        action()
    except DataError as error:
        return str(error)
    return None


def _questions(path: Path, data: DataDir) -> Iterator[str | None]:
    read = squad if path.name in {Path(name).name for name in SQUAD_FILES} else hotpot
    yield from itertools.repeat(None, len(read(data).questions))


def _essays(_: Path, data: DataDir) -> Iterator[str | None]:
    essays(data)
    yield None


def _prompt(path: Path, _: DataDir) -> Iterator[str | None]:
    yield from itertools.repeat(None, len(path.read_text(encoding="utf-8").splitlines()))


OFFICIAL: Final = (
    *(_Official("longbench", each.name, file_names(each.name), each.count, _each_row(parse_row)) for each in SETS),
    _Official("gsm8k", "test", gsm8k.FILES, GSM8K_COUNT, _each_row(gsm8k.parse_row)),
    _Official("gsm8k", "authors' prompt", (PROMPT_FILE, f"gsm8k/{PROMPT_FILE}"), PROMPT_LINES, _prompt),
    _Official("ruler", "essays", ESSAY_FILES, 1, _essays),
    _Official("ruler", "squad", SQUAD_FILES, SQUAD_COUNT, _questions),
    _Official("ruler", "hotpotqa", HOTPOT_FILES, HOTPOT_COUNT, _questions),
)


def check_data(path: Path) -> Iterator[Finding]:
    """Look for every official file.

    Parameters
    ----------
    path : Path
        The folder.

    Yields
    ------
    Finding
        One a file, in the order of suites.

    Raises
    ------
    DataError
        If there is no such folder.
    """
    data = DataDir(path)
    for official in OFFICIAL:
        yield _check(official, data)


def _check(official: _Official, data: DataDir) -> Finding:
    before = dict(data.hashes)
    try:
        path = data.find(*official.files)
    except DataError:
        return Finding(official.suite, official.name, "missing", official.files[0], 0, official.expected)
    relative = path.relative_to(data.path).as_posix()
    hashes = tuple((name, value) for name, value in data.hashes.items() if name not in before)
    errors: list[str] = []
    count = n_errors = 0
    try:
        for error in official.rows(path, data):
            count, n_errors = count + (error is None), n_errors + (error is not None)
            if error is not None and len(errors) < MOST_ERRORS:
                errors.append(error)
    except DataError as error:
        errors, n_errors = [*errors, str(error)], n_errors + 1
    status: Status = "broken" if n_errors else "ok" if count == official.expected else "other count"
    return Finding(
        official.suite, official.name, status, relative, count, official.expected, hashes, tuple(errors), n_errors
    )


def describe(finding: Finding) -> Iterator[str]:
    """Lines of text about a file."""
    rows = f"{finding.count} of {finding.expected}" if finding.count != finding.expected else str(finding.count)
    counted = "" if finding.status == "missing" else f", {rows} rows"
    yield f"{finding.status:12} {finding.suite:10} {finding.name:21} {finding.path}{counted}"
    yield from (f"{'':12} sha256 {value}  {name}" for name, value in finding.hashes)
    yield from (f"{'':12} {error}" for error in finding.errors)
    if finding.n_errors > len(finding.errors):
        yield f"{'':12} and {finding.n_errors - len(finding.errors)} more errors"


def report_data(path: Path, report: Callable[[str], None]) -> bool:
    """Report every official file of a folder.

    Parameters
    ----------
    path : Path
        The folder.
    report : callable
        Called with each line.

    Returns
    -------
    bool
        Whether something is there and nothing is broken.

    Raises
    ------
    DataError
        If there is no such folder.
    """
    statuses = []
    for finding in check_data(path):
        statuses.append(finding.status)
        for line in describe(finding):
            report(line)
    counts = {status: statuses.count(status) for status in get_args(Status)}
    report(", ".join(f"{count} {status}" for status, count in counts.items()))
    return counts["broken"] == 0 and counts["missing"] < len(statuses)
