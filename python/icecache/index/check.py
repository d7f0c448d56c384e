"""Numbers and names that a caller passes, checked; errors name the argument, the value and what was expected."""

from __future__ import annotations

import operator
from typing import SupportsFloat, SupportsIndex


def as_count(value: SupportsIndex, name: str, least: int = 0, unit: str = "") -> int:
    """Give an integer of at least `least`.

    Raises
    ------
    TypeError
        If it is no integer.
    ValueError
        If it is smaller.
    """
    try:
        number = operator.index(value)
    except TypeError:
        msg = f"{name}: expected an int, got {value!r}"
        raise TypeError(msg) from None
    if number < least:
        msg = f"{name}: expected at least {least}{unit}, got {number}"
        raise ValueError(msg)
    return number


def as_real(value: SupportsFloat, name: str) -> float:
    """Give a real number as a float; text is none.

    Raises
    ------
    TypeError
        If it is no number.
    """
    try:
        if not isinstance(value, (str, bytes, bytearray)):
            return float(value)
    except (TypeError, ValueError, OverflowError):
        pass
    msg = f"{name}: expected a number, got {value!r}"
    raise TypeError(msg)


def one_of(value: str, name: str, allowed: tuple[str, ...]) -> str:
    """Give one of some names.

    Raises
    ------
    ValueError
        If it is none of them.
    """
    if value not in allowed:
        msg = f"{name}: expected {', '.join(map(repr, allowed[:-1]))} or {allowed[-1]!r}, got {value!r}"
        raise ValueError(msg)
    return value
