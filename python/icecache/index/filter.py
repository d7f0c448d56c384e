"""Searching among some of the vectors only."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from icecache import _core
from icecache.index.convert import as_ids, from_tensor


class Filter:
    """Which ids a search may return, prepared for repeated use.

    Parameters
    ----------
    allowed : bool array, (n,), or array_like of int, (m,)
        Either ``allowed[i]`` says whether id ``i`` may be returned (ids from ``n`` on may not), or it lists the ids.
        Listed ids that the index does not hold are no mistake.

    Raises
    ------
    TypeError, ValueError
        If it is neither, or a listed id is out of range.

    Notes
    -----
    A filter may be used with several indexes and from several threads. Compiled to one 16-bit mask per page, it is kept
    for the state of the index that it was last used with, so further searches cost nothing until the index changes.
    """

    __slots__ = ("_core",)

    def __init__(self, allowed: npt.ArrayLike) -> None:
        array = np.asarray(from_tensor(allowed, "filter"))
        if array.dtype == np.bool_:
            if array.ndim != 1:
                msg = f"filter: expected one axis, got shape {array.shape}"
                raise ValueError(msg)
            self._core = _core.Filter(np.ascontiguousarray(array))
        else:
            self._core = _core.Filter(as_ids(array, "filter"))


#: What `filter=` accepts.
FilterLike: TypeAlias = "Filter | npt.ArrayLike"


def as_filter(allowed: FilterLike | None) -> _core.Filter | None:
    """Give the compiled core's filter for what a caller passed."""
    if allowed is None:
        return None
    return (allowed if isinstance(allowed, Filter) else Filter(allowed))._core
