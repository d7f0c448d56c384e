"""The model that ships: needle-3m, a Llama of 3.08 million parameters trained to retrieve from long contexts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def needle_path() -> Path:
    """Folder of the shipped weights, configuration and tokenizer.

    Returns
    -------
    Path
        An existing folder that `from_pretrained` accepts.

    Raises
    ------
    FileNotFoundError
        If the installation lacks the package data.
    """
    path = Path(__file__).resolve().parents[2] / "models" / "needle-3m"
    if not (path / "model.safetensors").is_file():
        msg = f"the shipped model is missing: no model.safetensors in {path}; reinstall icecache"
        raise FileNotFoundError(msg)
    return path


@contextmanager
def without_progress_bar() -> Iterator[None]:
    """Silence transformers' bar for a file of 6 MiB, and give it back."""
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()


def load_needle(
    device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Load needle-3m from the package; needs no network.

    Parameters
    ----------
    device : torch.device or str, default="cpu"
        Where to put the weights.
    dtype : torch.dtype, default=torch.float32
        Type to compute in. The file holds bfloat16, which CPUs compute slowly.

    Returns
    -------
    model : PreTrainedModel
        In evaluation mode.
    tokenizer : PreTrainedTokenizerFast
        Its tokenizer; adds no special tokens by itself.

    Raises
    ------
    FileNotFoundError
        If the installation lacks the package data.
    """
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    path = needle_path()
    with without_progress_bar():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
    return model.to(device).eval(), tokenizer
