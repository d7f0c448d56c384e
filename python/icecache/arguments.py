"""Values of command-line arguments, read from text."""

from __future__ import annotations

import argparse


def token_count(text: str) -> int:
    """Read "16384" or "16k".

    Raises
    ------
    argparse.ArgumentTypeError
        If it is neither.
    """
    digits, unit = (text[:-1], 1024) if text[-1:] in {"k", "K"} else (text, 1)
    if not digits.isascii() or not digits.isdigit():
        msg = f"must be a number of tokens such as 16384 or 16k, got {text!r}"
        raise argparse.ArgumentTypeError(msg)
    return int(digits) * unit


def task_list(text: str) -> tuple[str, ...]:
    """Read names separated by commas."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def count_list(text: str) -> tuple[int, ...]:
    """Read numbers of tokens separated by commas."""
    return tuple(token_count(part.strip()) for part in text.split(","))
