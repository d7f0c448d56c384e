"""The largest haystack whose prompt fits a number of tokens."""

from __future__ import annotations

from collections.abc import Callable

from icecache.errors import ConfigError


def largest(fits: Callable[[int], bool], *, least: int, step: int, most: int | None) -> int:
    """Largest size of `least`, `least + step`, `least + 2 step`, ... that fits, by doubling and bisection.

    Parameters
    ----------
    fits : callable
        Whether a size fits; true up to some size and false from there on.
    least, step : int
        At least 1.
    most : int or None
        No size above it is tried.

    Returns
    -------
    int
        As above.

    Raises
    ------
    ConfigError
        If not even `least` fits.
    """
    if not fits(least):
        msg = f"the smallest prompt of this form does not fit (haystack of {least})"
        raise ConfigError(msg)
    last = None if most is None else max(0, (most - least) // step)
    low, high = 0, 1
    while (last is None or high <= last) and fits(least + high * step):
        low, high = high, high * 2
    if last is not None:
        high = min(high, last + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(least + middle * step) else (low, middle)
    return least + low * step


def smaller(size: int, *, least: int, step: int) -> int | None:
    """Next smaller size, or None where there is none."""
    return size - step if size - step >= least else None
