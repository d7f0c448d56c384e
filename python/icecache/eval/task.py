"""What a suite offers: samples in two parts, a score, and the folder its data comes from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from icecache.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_META: Mapping[str, str | int | float] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Turn:
    """Text that is given after an answer, and a further answer to it.

    Parameters
    ----------
    given : str
        Fed token by token the arm's way; stands in the prediction between the two answers.
    max_new_tokens : int
        Of the further answer.
    """

    given: str
    max_new_tokens: int


@dataclass(frozen=True, slots=True)
class Sample:
    """One question about one context. The prompt is `context + question`, nothing in between.

    Parameters
    ----------
    task : str
        Name of the task.
    id : str
        Stable: the same task, length, seed and index give the same sample; unique within the task.
    context : str
        Prefilled densely in both setups. The runner puts one `<bos>` in front where the tokenizer has one.
    question : str
        Setup A: prefilled densely, but for its last token. Setup B: fed token by token the arm's way. Not empty.
    references : tuple of str
        Right answers, or what the score looks for.
    max_new_tokens : int
        Most tokens of the answer.
    stop : tuple of str, default=()
        The answer ends before the first of these, or at the end-of-sequence token.
    chat : bool, default=True
        Apply the tokenizer's chat template, if it has one.
    meta : mapping, default=empty
        What tables group by: "length" and "depth" (0..1) have a meaning to the report, all else is only kept.
    turns : tuple of Turn, default=()
        What follows the first answer.
    answer_prefix : str, default=""
        Beginning of the answer, given: behind the chat template's generation prompt, or behind the question. Belongs to
        the question; not part of the prediction.
    min_new_tokens : int, default=0
        Neither a stop string nor the end of the sequence before so many tokens.
    shots : tuple of (str, str), default=()
        Earlier messages of user and assistant, part of the context. Without a chat template they are written one after
        the other, each pair as user, assistant and an empty line.
    system : str, default=""
        System message, where the chat template is applied.
    double_bos : bool, default=False
        Tokenise a rendered chat template with one more `<bos>` in front, as the paper's authors did for LongBench.
    """

    task: str
    id: str
    context: str
    question: str
    references: tuple[str, ...]
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    chat: bool = True
    meta: Mapping[str, str | int | float] = field(default_factory=lambda: NO_META)
    turns: tuple[Turn, ...] = ()
    answer_prefix: str = ""
    min_new_tokens: int = 0
    shots: tuple[tuple[str, str], ...] = ()
    system: str = ""
    double_bos: bool = False


class DataDir:
    """A folder with official data files; remembers the SHA-256 of every file that was used.

    Parameters
    ----------
    path : Path
        The folder.

    Attributes
    ----------
    hashes : dict of str to str
        SHA-256 by path relative to the folder.

    Raises
    ------
    DataError
        If there is no such folder.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            msg = f"--data-dir must be a folder, got {path}"
            raise DataError(msg)
        self.path = path
        self.hashes: dict[str, str] = {}

    def find(self, *names: str) -> Path:
        """Path of the first of these files or folders that exists, hashed.

        Parameters
        ----------
        *names : str
            Paths relative to the folder, in order of preference.

        Raises
        ------
        DataError
            If none exists; the message names them all.
        """
        for name in names:
            path = self.path / name
            if path.exists():
                for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
                    self.hashes[file.relative_to(self.path).as_posix()] = file_sha256(file)
                return path
        msg = f"{self.path} has none of: {', '.join(names)}"
        raise DataError(msg)


class Task(Protocol):
    """A named kind of question with its score.

    Attributes
    ----------
    name : str
        Unique over all suites.
    suite : str
        Name of its suite.
    metric : str
        What the score is, for table headers: "exact match", "token F1".
    """

    @property
    def name(self) -> str: ...  # noqa: D102 - see the class

    @property
    def suite(self) -> str: ...  # noqa: D102

    @property
    def metric(self) -> str: ...  # noqa: D102

    def samples(
        self, tokenizer: PreTrainedTokenizerBase, *, length: int | None, n: int, seed: int, data: DataDir | None
    ) -> Iterator[Sample]:
        """Give samples.

        Parameters
        ----------
        tokenizer : PreTrainedTokenizerBase
            Of the model; lengths are counted with it.
        length : int or None
            Tokens of prompt and answer together, roughly where the form allows no more; None: as the data has it.
        n : int
            How many; fewer if the data ends before.
        seed : int
            The only source of randomness.
        data : DataDir or None
            Where official files are; None: the hub, or no files.

        Raises
        ------
        DataError
            If data is missing or in another format than expected.
        """
        ...

    def score(self, prediction: str, sample: Sample) -> float:
        """Grade an answer between 0 and 1. `sample.context` is empty by then: the runner does not keep it."""
        ...


@runtime_checkable
class Graded(Protocol):
    """A task whose answers are graded in further ways, which tables show beside the score."""

    def grades(self, prediction: str, sample: Sample) -> Mapping[str, float]:
        """Further grades between 0 and 1 by name."""
        ...


@dataclass(frozen=True, slots=True)
class Suite:
    """Tasks that belong together.

    Parameters
    ----------
    name : str
        Key of the registry.
    summary : str
        One line for help texts.
    tasks : tuple of Task
        All of them.
    samples : int
        How many a task and length by default.
    lengths : tuple of int, default=()
        Lengths in tokens by default; empty: the data has its own, and `--lengths` does not apply.
    default_tasks : tuple of str, default=()
        Names of the tasks that run unless others are asked for; empty: all.
    label : str, default=""
        Put beside its scores wherever they stand ("synthetic", say).
    """

    name: str
    summary: str
    tasks: tuple[Task, ...]
    samples: int
    lengths: tuple[int, ...] = ()
    default_tasks: tuple[str, ...] = ()
    label: str = ""


def file_sha256(path: Path) -> str:
    """SHA-256 of a file, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(path)


def _digest(path: Path) -> str:
    digest = hashlib.sha256()  # Python 3.10 has no file_digest
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
