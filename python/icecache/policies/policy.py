"""A policy is a selector and a layout. All policies read the same number of tokens at the same budget."""

from __future__ import annotations

from dataclasses import dataclass

from icecache.config import IceConfig
from icecache.errors import ConfigError
from icecache.pages import Layout
from icecache.select import RandomPages, Selector, TokenOracle, TreeSearch

POLICIES = ("icecache", "streaming", "page-oracle", "token-oracle", "random")
STREAMING_SINK_TOKENS = 4
"""Attention sinks of StreamingLLM (Xiao et al., arXiv 2309.17453)."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What stays near, and what reads the rest (None: nothing does)."""

    layout: Layout
    selector: Selector | None


def make_policy(name: str, config: IceConfig) -> Policy:
    """Policy by name.

    Parameters
    ----------
    name : str
        "icecache": tree search. "page-oracle": the same pages, scored exactly. "token-oracle": the best single tokens.
        "random": random pages. "streaming": StreamingLLM without re-numbering: the first 4 and the last ``budget - 4``
        tokens; what leaves the window is forgotten, so later chunks are always processed token by token.

    Raises
    ------
    ConfigError
        If there is no such policy.
    """
    layout = Layout(config.sink_tokens, config.window_tokens)
    if name == "icecache":
        return Policy(layout, TreeSearch())
    if name == "page-oracle":
        return Policy(layout, TreeSearch(exact=True))
    if name == "token-oracle":
        return Policy(layout, TokenOracle())
    if name == "random":
        return Policy(layout, RandomPages(config.seed))
    if name == "streaming":
        return Policy(Layout(STREAMING_SINK_TOKENS, config.budget - STREAMING_SINK_TOKENS, keeps_middle=False), None)
    msg = f"policy must be one of {', '.join(POLICIES)}, got {name!r}"
    raise ConfigError(msg)
