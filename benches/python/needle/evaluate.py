"""Teacher-forced evaluation: as every answer token must be the argmax, this equals greedy exact match."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from icecache.eval.needle.samples import make_rows
from icecache.eval.needle.tasks import TASKS

from needle.model import NeedleModel

Table = dict[str, dict[int, tuple[float, float]]]
TOKENS_AT_ONCE = {"cuda": 1 << 18, "cpu": 1 << 13}


def mixed_precision(device: torch.device) -> AbstractContextManager[object]:
    """bfloat16 autocast on CUDA, nothing on a CPU."""
    return torch.autocast("cuda", dtype=torch.bfloat16) if device.type == "cuda" else nullcontext()


@torch.no_grad()
def score(model: NeedleModel, task: str, length: int, rows: int, seed: int) -> tuple[float, float]:
    """Exact match and token accuracy of one task at one length.

    Parameters
    ----------
    model : NeedleModel
        In evaluation mode.
    task : str
        Key of `TASKS`.
    length : int
        Tokens of a row.
    rows : int
        At least so many rows, in batches that fit.
    seed : int
        Of the first batch.

    Returns
    -------
    tuple of float
        Both between 0 and 1.
    """
    device = model.model.embed_tokens.weight.device
    at_once = max(1, min(rows, TOKENS_AT_ONCE[device.type] // length))
    whole, single = [], []
    for batch_seed in range(seed, seed + -(-rows // at_once)):
        batch = make_rows(task, length, at_once, batch_seed, device)
        with mixed_precision(device):
            hidden = model.hidden(batch.tokens)
            row, place = (batch.queries > 0).nonzero(as_tuple=True)
            logits = model.logits(hidden[row, place - 1])
        right = (logits.argmax(-1) == batch.tokens[row, place]).float()
        whole.append(torch.ones(at_once, device=device).scatter_reduce_(0, row, right, "amin"))
        single.append(right)
    return float(torch.cat(whole).mean()), float(torch.cat(single).mean())


def evaluate(model: NeedleModel, lengths: tuple[int, ...], rows: int = 64, seed: int = 1234) -> Table:
    """Score every task at every length and print the table: exact match (token accuracy)."""
    print("task".ljust(10) + "".join(str(length).rjust(16) for length in lengths))
    table: Table = {}
    for task in TASKS:
        table[task] = {length: score(model, task, length, rows, seed) for length in lengths}
        cells = (f"{exact:.2f} ({token:.2f})".rjust(16) for exact, token in table[task].values())
        print(task.ljust(10) + "".join(cells), flush=True)
    return table
