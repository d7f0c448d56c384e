"""What a run writes: one JSON line a sample, arm and setup, and a manifest of how the run was made.

An arm is "policy@budget", or a control's name without a budget ("full", "exact", "no-context").
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Final, Literal, TypeAlias

from icecache.errors import DataError

Setup: TypeAlias = Literal["A", "B"]
SETUPS: Final[tuple[Setup, ...]] = ("A", "B")
FORMAT: Final = 1
"""Version of both files."""

Json: TypeAlias = "str | int | float | bool | list[Json] | dict[str, Json] | None"
Key: TypeAlias = tuple[str, str, str, Setup]


@dataclass(frozen=True, slots=True)
class ArmStats:
    """What an arm read and how long it took: means over the batch that a sample ran in.

    Parameters
    ----------
    attended : float
        Tokens attended per query head, sparse layer and step.
    loaded : float
        Tokens loaded per KV head, sparse layer and step: the union over the query heads of its group.
    pages, bytes : int
        Pages and bytes brought to the compute device, by the whole batch.
    mass : float or None
        Estimated share of the softmax that the attended tokens hold; None where nothing estimates it.
    ttft_s : float
        Seconds from the prompt to the first token: prefill, taking the cache over, and question.
    tpot_s : float
        Seconds per token after it, of the whole batch.
    dense_layers : tuple of int
        Layers that attended to everything.
    generated_kept : str
        What becomes of generated tokens: "all" are attended on top of the budget, or they compete within it.
    parameters : mapping of str to float
        What a policy chose by itself, where it did.
    rows : int
        Samples of the batch.
    """

    attended: float
    loaded: float
    pages: int
    bytes: int
    mass: float | None
    ttft_s: float
    tpot_s: float
    dense_layers: tuple[int, ...] = ()
    generated_kept: str = ""
    parameters: Mapping[str, float] = field(default_factory=dict)
    rows: int = 1


@dataclass(frozen=True, slots=True)
class Record:
    """One answer of one arm.

    Parameters
    ----------
    suite, task, id, arm, setup
        Which sample, which arm; `(task, id, arm, setup)` is unique in a file.
    prompt_sha256 : str
        Of the rendered prompt's text; pairs across runs must agree in it.
    n_prompt, n_generated : int
        Tokens of context and question, and of the answer.
    prediction : str
        The answer, given turns included.
    references : tuple of str
        As in the sample.
    score : float
        0 to 1.
    budget : int or None
        Nominal tokens of the arm; None for controls without one.
    seed : int
        Of the run.
    stats : ArmStats
        Accounting and times.
    grades : mapping of str to float
        Further grades of the task.
    meta : mapping
        As in the sample.
    """

    suite: str
    task: str
    id: str
    arm: str
    setup: Setup
    prompt_sha256: str
    n_prompt: int
    n_generated: int
    prediction: str
    references: tuple[str, ...]
    score: float
    budget: int | None
    seed: int
    stats: ArmStats
    grades: Mapping[str, float] = field(default_factory=dict)
    meta: Mapping[str, str | int | float] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        """What identifies the record."""
        return self.task, self.id, self.arm, self.setup

    @property
    def policy(self) -> str:
        """Policy of the arm, without the budget."""
        return self.arm.partition("@")[0]

    @property
    def length(self) -> int | None:
        """Nominal length of the sample in tokens; None: the data has its own."""
        length = self.meta.get("length")
        return int(length) if length is not None else None

    def to_json(self) -> str:
        """One line without a line break."""
        data: dict[str, object] = {f.name: getattr(self, f.name) for f in fields(self)}
        data |= {"stats": asdict(self.stats), "grades": dict(self.grades), "meta": dict(self.meta)}
        return json.dumps(data, ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_json(cls, line: str) -> Record:
        """Read a line.

        Raises
        ------
        DataError
            If it is not a record of this version; the message says what is wrong.
        """
        try:
            data = json.loads(line)
            stats = data.pop("stats")
            stats["dense_layers"] = tuple(stats["dense_layers"])
            data["references"] = tuple(data["references"])
            record = cls(**data, stats=ArmStats(**stats))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            msg = f"not a record of format {FORMAT}: {error}"
            raise DataError(msg) from error
        if record.setup not in SETUPS or not isinstance(record.score, (int, float)) or not 0 <= record.score <= 1:
            msg = f"setup must be A or B and score in 0..1, got {record.setup!r} and {record.score!r}"
            raise DataError(msg)
        return record


def finite(value: float) -> float | None:
    """Give the value, or None where it is NaN or infinite (JSON has neither)."""
    return value if math.isfinite(value) else None


@dataclass(frozen=True, slots=True)
class RunPart:
    """One start of the command: a resumed run has several.

    Parameters
    ----------
    command : str
        The command line.
    started : str
        ISO date and time, UTC.
    git : str or None
        Commit of the checkout it ran from; None: an installed package.
    versions : mapping of str to str
        Of icecache, torch, transformers, Python.
    hardware : mapping of str to str or int
        Device, processor, cores.
    """

    command: str
    started: str
    git: str | None
    versions: Mapping[str, str]
    hardware: Mapping[str, str | int]


@dataclass(frozen=True, slots=True)
class Manifest:
    """How the records beside it were made.

    Parameters
    ----------
    identity : mapping
        What all records of a file share: model and its hash, dtype, seed, dense layers, settings, protocol. A run
        resumes only with the same.
    data : mapping of str to str
        SHA-256 of the data files used.
    labels : mapping of str to str
        Per suite the label of its scores ("synthetic"), where it has one.
    metrics : mapping of str to str
        Per task what its score is.
    parts : tuple of RunPart
        Every start of the command, in order.
    format : int
        Version.
    """

    identity: Mapping[str, Json]
    data: Mapping[str, str]
    labels: Mapping[str, str]
    metrics: Mapping[str, str]
    parts: tuple[RunPart, ...]
    format: int = FORMAT

    def to_json(self) -> str:
        """Write as indented JSON."""
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read what `to_json` wrote.

        Raises
        ------
        DataError
            If it is no manifest of this version.
        """
        try:
            data = json.loads(text)
            if data["format"] != FORMAT:
                msg = f"the manifest has format {data['format']!r}, this version reads {FORMAT}"
                raise DataError(msg)
            names = {f.name for f in fields(cls)}
            parts = tuple(RunPart(**part) for part in data["parts"])
            return cls(**{k: v for k, v in data.items() if k in names - {"parts"}}, parts=parts)
        except (ValueError, TypeError, KeyError) as error:
            if isinstance(error, DataError):
                raise
            msg = f"not a manifest of format {FORMAT}: {error!r}"
            raise DataError(msg) from error
