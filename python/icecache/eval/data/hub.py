"""Data sets of the Hugging Face hub, through `datasets`, where no folder was given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from icecache.errors import DataError


def load_hub(name: str, config: str | None, split: str, *, hint: str) -> Sequence[Mapping[str, object]]:
    """All rows of a split; from the local cache when `HF_HUB_OFFLINE` is set.

    Parameters
    ----------
    name, config, split : str
        As `datasets.load_dataset` wants them.
    hint : str
        What else the user can do; ends the message of an error.

    Raises
    ------
    DataError
        If `datasets` is not installed, or the data set cannot be had.
    """
    try:
        from datasets import load_dataset
    except ImportError as error:
        msg = f"reading {name} from the hub needs `pip install icecache[eval]`; {hint}"
        raise DataError(msg) from error
    try:
        return list(load_dataset(name, config, split=split))
    except Exception as error:  # whatever the hub, the network or the cache raise: none of it is ours
        msg = f"cannot read {name} from the hub ({type(error).__name__}: {error}); {hint}"
        raise DataError(msg) from error
