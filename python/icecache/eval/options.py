"""Options of `icecache eval run`, checked before anything is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias, get_args

from icecache.config import IceConfig
from icecache.errors import ConfigError
from icecache.eval.arms import CONTROLS, Arm, DenseLayers, check_arms, parse_settings, plan_arms
from icecache.eval.record import SETUPS, Setup

Dtype: TypeAlias = Literal["auto", "float32", "bfloat16", "float16"]
SHIPPED: Final = "needle-3m"


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalOptions:
    """What to run.

    Parameters
    ----------
    out : Path
        Folder of the results; made if missing.
    model : str, default="needle-3m"
        "needle-3m" (shipped), a folder that `from_pretrained` reads, or a hub id.
    suite : tuple of str, default=("needle",)
        Keys of :data:`icecache.eval.suites.SUITES`.
    tasks : tuple of str, default=()
        Names of tasks; empty: each suite's default.
    lengths : tuple of int, default=()
        Tokens of prompt and answer; empty: each suite's default. Suites with data of their own ignore it.
    policies : tuple of str, default=("icecache",)
        Names of policies; each runs at each budget.
    budgets : tuple of int, default=(64, 256)
        Tokens attended.
    controls : tuple of str, default: all
        Keys of :data:`icecache.eval.arms.CONTROLS`.
    setup : tuple of {"A", "B"}, default=("B",)
        A: the question is part of the dense prefill. B: question and answer are sparse.
    limit : int or None, default=None
        Samples a task and length; None: each suite's default.
    data_dir : Path or None, default=None
        Folder of official data files.
    resume : bool, default=False
        Go on with the records in `out`.
    device : str, default="cpu"
        Of the model.
    dtype : {"auto", "float32", "bfloat16", "float16"}, default="auto"
        Auto: float32 on a CPU, bfloat16 elsewhere.
    batch : int, default=1
        Most samples of a batch; only samples of one shape share one.
    seed : int, default=0
        Of samples and policies.
    dense_layers : {"matched", "published"}, default="matched"
        The same layers stay dense in every arm (none below 16 layers, else the first two), or each policy's own.
    settings : tuple of str, default=()
        "key=value" for fields of :class:`IceConfig`.

    Raises
    ------
    ConfigError
        If an option is out of range or unknown; the message names the argument, its value and what was expected.
    """

    out: Path
    model: str = SHIPPED
    suite: tuple[str, ...] = ("needle",)
    tasks: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    policies: tuple[str, ...] = ("icecache",)
    budgets: tuple[int, ...] = (64, 256)
    controls: tuple[str, ...] = tuple(CONTROLS)
    setup: tuple[Setup, ...] = ("B",)
    limit: int | None = None
    data_dir: Path | None = None
    resume: bool = False
    device: str = "cpu"
    dtype: Dtype = "auto"
    batch: int = 1
    seed: int = 0
    dense_layers: DenseLayers = "matched"
    settings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_count("--batch", self.batch, 1, 4096)
        _check_count("--seed", self.seed, 0, 2**31 - 1)
        if self.limit is not None:
            _check_count("--limit", self.limit, 1, 10**9)
        for length in self.lengths:
            _check_count("--lengths", length, 1, 2**31)
        _check_choice("--dtype", self.dtype, get_args(Dtype))
        _check_choice("--dense-layers", self.dense_layers, get_args(DenseLayers))
        for setup in self.setup or ("",):
            _check_choice("--setup", setup, SETUPS)
        if self.out.exists() and not self.out.is_dir():
            msg = f"--out must be a folder, got the file {self.out}"
            raise ConfigError(msg)
        check_arms(self.arms(), self.base_config())

    def arms(self) -> tuple[Arm, ...]:
        """All arms, full attention first."""
        return plan_arms(self.policies, self.budgets, self.controls)

    def base_config(self) -> IceConfig:
        """Give the settings all arms share; `dense_below` is 0, so that the budget rules short prompts, too."""
        settings = {"dense_below": 0, **parse_settings(self.settings)}
        return IceConfig(seed=self.seed, **settings)  # type: ignore[arg-type]

    def dtype_name(self) -> str:
        """Say what "auto" stands for."""
        if self.dtype != "auto":
            return self.dtype
        return "float32" if self.device.startswith("cpu") else "bfloat16"


def _check_count(argument: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        msg = f"{argument} must be an integer in {low}..{high}, got {value!r}"
        raise ConfigError(msg)


def _check_choice(argument: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        msg = f"{argument} must be one of {', '.join(choices)}, got {value!r}"
        raise ConfigError(msg)
