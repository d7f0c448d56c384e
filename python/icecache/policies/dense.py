"""Which layers stay dense: the same ones for every policy of a comparison, or each paper's own."""

from __future__ import annotations

_SMALL = 16
"""Below so many layers, two dense ones would be a large part of the model."""
_PUBLISHED = {
    "quest": (0, 1),
    "arkvale": (0, 1),
    "magicpig": (0, 16),
    "icecache": (0, 1),
    "icecache-reuse": (0, 1),
    "icecache-paper": (0, 1),
    "token-oracle": (0, 1),
    "token-oracle-q": (0, 1),
}


def matched_dense_layers(n_layers: int) -> tuple[int, ...]:
    """Give every policy of a table the same dense layers: none in a small model, the first two from 16 layers on.

    Two, because Quest, ArkVale and IceCache were all published with the first two layers dense.
    """
    return () if n_layers < _SMALL else (0, 1)


def published_dense_layers(policy: str, n_layers: int) -> tuple[int, ...]:
    """Layers that the publication of `policy` keeps dense; none where it names none.

    That is so for StreamingLLM, SnapKV, PQCache and H2O.
    OmniKV's own ones belong to its method and come on top by themselves.
    """
    return tuple(layer for layer in _PUBLISHED.get(policy, ()) if layer < n_layers)
