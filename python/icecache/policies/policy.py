"""Policies by name. At the same budget all attend to as many tokens; docs/policies.md says how they count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from icecache.config import IceConfig
from icecache.errors import ConfigError
from icecache.pages import Layout
from icecache.policies.arkvale import ArkVale
from icecache.policies.full import Full
from icecache.policies.h2o import H2O
from icecache.policies.magicpig import MagicPIG
from icecache.policies.omnikv import OmniKV
from icecache.policies.page_oracle import PositionalPageOracle
from icecache.policies.paper import IceCachePaper
from icecache.policies.pqcache import PQCache
from icecache.policies.quest import Quest
from icecache.policies.sampling import OracleSampling
from icecache.policies.snapkv import SnapKV
from icecache.policies.token_oracle import TokenOracle
from icecache.select import MaskPolicy, RandomPages, Selector, TreeSearch

PUBLISHED_REUSE = 3
"""Layers that share pages in IceCache(reuse), as published (arXiv 2604.10539)."""
STREAMING_SINK_TOKENS = 4
"""Attention sinks of StreamingLLM (Xiao et al., arXiv 2309.17453)."""


@dataclass(frozen=True, slots=True)
class Policy:
    """How a step attends: by pages on the host, or by a mask over everything.

    Parameters
    ----------
    layout : Layout
        What stays near, with pages.
    selector : Selector or None
        What reads the rest; None: nothing does.
    masks : MaskPolicy or None
        Set: everything stays on the device and this masks it; layout and selector mean nothing then.
    generated_kept : str
        What becomes of generated tokens, see :class:`icecache.select.MaskPolicy`.
    reuse : int
        Layers that share pages where the config leaves them alone (1).
    """

    layout: Layout
    selector: Selector | None
    masks: MaskPolicy | None = None
    generated_kept: str = "indexed"
    reuse: int = 1


_PAGES: dict[str, Callable[[IceConfig], Selector]] = {
    "icecache": lambda _: TreeSearch(),
    "page-oracle": lambda _: TreeSearch(exact=True),
    "random": lambda config: RandomPages(config.seed),
}
_MASKS: dict[str, Callable[[IceConfig], MaskPolicy]] = {
    "full": lambda _: Full(),
    "icecache-paper": lambda config: IceCachePaper(config.budget, config.sink_tokens, config.window, config.threads),
    "snapkv": lambda config: SnapKV(config.budget, window=min(32, config.budget // 2)),
    "h2o": lambda config: H2O(config.budget),
    "quest": lambda config: Quest(config.budget),
    "arkvale": lambda config: ArkVale(config.budget),
    "pqcache": lambda config: PQCache(config.budget, seed=config.seed),
    "omnikv": lambda config: OmniKV(config.budget),
    "magicpig": lambda config: MagicPIG(config.budget, seed=config.seed),
    "token-oracle": lambda config: TokenOracle(config.budget, config.sink_tokens, config.window),
    "token-oracle-q": lambda config: TokenOracle(config.budget, config.sink_tokens, config.window, "query"),
    "page-oracle-positional": lambda config: PositionalPageOracle(config.budget, config.sink_tokens, config.window),
    "oracle-sampling": lambda config: OracleSampling(config.budget, seed=config.seed),
}
REUSING = "icecache-reuse"
POLICIES = (*_PAGES, REUSING, "streaming", *_MASKS)


def make_policy(policy: str | MaskPolicy, config: IceConfig) -> Policy:
    """Policy by name, with its published settings at the budget of `config`; or one with settings of your own.

    Parameters
    ----------
    policy : str or MaskPolicy
        "icecache": tree search. "icecache-reuse": the same with ``reuse=3``, or the config's, if that is more than 1.
        "page-oracle": the same pages, scored exactly. "random": random pages. "streaming":
        StreamingLLM without re-numbering: the first 4 and the last ``budget - 4`` tokens; what leaves the window is
        forgotten, so later chunks are always processed token by token. The others are classes of this package, each
        with its source, rule and defaults: "full", "icecache-paper", "snapkv", "h2o", "quest", "arkvale",
        "pqcache", "omnikv", "magicpig", "token-oracle", "token-oracle-q", "page-oracle-positional", "oracle-sampling".

    Raises
    ------
    ConfigError
        If there is no such policy, or the budget is too small for it.
    """
    layout = Layout(config.sink_tokens, config.window)
    if not isinstance(policy, str):
        return Policy(layout, None, policy, policy.generated_kept)
    if policy == REUSING:
        return Policy(layout, TreeSearch(), reuse=PUBLISHED_REUSE)
    if policy in _PAGES:
        return Policy(layout, _PAGES[policy](config))
    if policy in _MASKS:
        masks = _MASKS[policy](config)
        return Policy(layout, None, masks, masks.generated_kept)
    if policy == "streaming":
        near = Layout(STREAMING_SINK_TOKENS, config.budget - STREAMING_SINK_TOKENS, keeps_middle=False)
        return Policy(near, None, generated_kept="window")
    msg = f"policy must be one of {', '.join(POLICIES)}, got {policy!r}"
    raise ConfigError(msg)
