"""The arms of a comparison: which policies at which budgets, and the controls without which no table is worth much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from types import MappingProxyType
from typing import Final, Literal, TypeAlias

from icecache.config import PAGE_TOKENS, IceConfig
from icecache.errors import ConfigError
from icecache.policies import POLICIES, make_policy, matched_dense_layers, published_dense_layers

CONTROLS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "full": "the model's own attention over everything: what all else is compared with",
        "exact": "icecache with a budget that covers the context: must give the same tokens as full",
        "random": "random pages at each budget: what chance finds",
        "streaming": "first and newest tokens at each budget: what needs no retrieval",
        "no-context": "the question alone: what the model knows or guesses",
        "full-eager": "full once more with another attention kernel: the noise of rounding",
    }
)
BUDGETED: Final = frozenset({"random", "streaming"})
"""Controls that run at every budget; the others have none."""
DENSE: Final = frozenset({"full", "no-context", "full-eager"})
"""Arms that attend to all they have: the model runs as it is."""
DenseLayers: TypeAlias = Literal["matched", "published"]


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to attend.

    Parameters
    ----------
    policy : str
        Name of a policy or a control.
    budget : int or None
        Tokens; None for controls without one.
    """

    policy: str
    budget: int | None = None

    @property
    def name(self) -> str:
        """As records have it: "icecache@64", "full"."""
        return self.policy if self.budget is None else f"{self.policy}@{self.budget}"

    @property
    def runs(self) -> str:
        """Name of the policy that runs."""
        return "icecache" if self.policy == "exact" else self.policy


def plan_arms(policies: tuple[str, ...], budgets: tuple[int, ...], controls: tuple[str, ...]) -> tuple[Arm, ...]:
    """All arms, full attention first.

    Parameters
    ----------
    policies : tuple of str
        Names of policies, or of controls.
    budgets : tuple of int
        Each policy runs at each.
    controls : tuple of str
        Keys of :data:`CONTROLS`.

    Raises
    ------
    ConfigError
        If a name is unknown, or there is no budget for a policy that needs one.
    """
    known = {*POLICIES, *CONTROLS}
    unknown = [name for name in policies if name not in known]
    if unknown:
        msg = f"--policies must name policies of {', '.join(sorted(known))}, got {', '.join(unknown)}"
        raise ConfigError(msg)
    unknown = [name for name in controls if name not in CONTROLS]
    if unknown:
        msg = f"--controls must name controls of {', '.join(CONTROLS)}, or be none, got {', '.join(unknown)}"
        raise ConfigError(msg)
    names = list(dict.fromkeys([*controls, *policies]))
    names.sort(key=lambda name: name != "full")
    needs_budget = [name for name in names if name in BUDGETED or name not in CONTROLS]
    if needs_budget and not budgets:
        msg = f"--budgets must name at least one budget for {', '.join(needs_budget)}, got none"
        raise ConfigError(msg)
    arms = []
    for name in names:
        arms += [Arm(name, budget) for budget in dict.fromkeys(budgets)] if name in needs_budget else [Arm(name)]
    return tuple(arms)


def parse_settings(pairs: tuple[str, ...]) -> dict[str, object]:
    """Fields of :class:`IceConfig` from "key=value".

    Raises
    ------
    ConfigError
        If a key is unknown or set by an argument of its own, or a value cannot be read. Ranges are checked later.
    """
    own = {"budget": "--budgets", "dense_layers": "--dense-layers", "seed": "--seed"}
    types = {f.name: str(f.type) for f in fields(IceConfig)}
    settings: dict[str, object] = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or key not in types or key in own:
            expected = ", ".join(sorted(set(types) - set(own)))
            hint = f"; use {own[key]}" if key in own else ""
            msg = f"--set must be KEY=VALUE with a key of {expected}, got {pair!r}{hint}"
            raise ConfigError(msg)
        settings[key] = _read_value(key, text, types[key])
    return settings


def _read_value(key: str, text: str, kind: str) -> object:
    if text.lower() == "none" and "None" in kind:
        return None
    if kind.startswith("bool"):
        if text.lower() not in {"true", "false"}:
            msg = f"--set {key} must be true or false, got {text!r}"
            raise ConfigError(msg)
        return text.lower() == "true"
    if kind.startswith("int"):
        try:
            return int(text)
        except ValueError as error:
            msg = f"--set {key} must be an integer, got {text!r}"
            raise ConfigError(msg) from error
    return text


def check_arms(arms: Sequence[Arm], base: IceConfig) -> None:
    """Refuse arms whose budget does not suit their policy.

    Raises
    ------
    ConfigError
        Naming the arm.
    """
    for arm in arms:
        if arm.policy in DENSE:
            continue
        try:
            make_policy(arm.runs, arm_config(arm, base))
        except ConfigError as error:
            msg = f"{arm.name}: {error}"
            raise ConfigError(msg) from error


def dense_layers(arm: Arm, mode: DenseLayers, n_layers: int) -> tuple[int, ...]:
    """Layers that an arm keeps dense.

    Parameters
    ----------
    arm : Arm
        Which.
    mode : {"matched", "published"}
        The same in all arms, or as the policy was published.
    n_layers : int
        Of the model.
    """
    return matched_dense_layers(n_layers) if mode == "matched" else published_dense_layers(arm.runs, n_layers)


def arm_config(arm: Arm, base: IceConfig, n_tokens: int = 0) -> IceConfig:
    """Give the settings of an arm.

    Parameters
    ----------
    arm : Arm
        A policy with its budget, or "exact".
    base : IceConfig
        Settings all arms share.
    n_tokens : int, default=0
        Longest sequence the arm will see; the budget of "exact" covers it. Its steps run op by op: a graph has a place
        for every page that it might read, which are all of them here.

    Raises
    ------
    ConfigError
        If the budget does not fit the settings.
    """
    if arm.policy != "exact":
        return replace(base, budget=arm.budget if arm.budget is not None else base.budget)
    near = base.sink_tokens + base.window
    return replace(base, budget=near + PAGE_TOKENS * (2 * n_tokens // PAGE_TOKENS + 2), decode="eager")
