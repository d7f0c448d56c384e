"""Records: the token spans that a task puts into the filler, and the queries about them.

Dimension key: B rows of a batch, R records of a row, L tokens of the longest record, k tokens of one piece.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from icecache.eval.needle.draw import Draw


@dataclass(frozen=True, slots=True)
class Request:
    """What a task is asked for.

    Parameters
    ----------
    rows : int
        Rows of the batch, B.
    n_tokens : int
        Length of each row with its beginning-of-sequence token, filler, records, questions and answers.
    evaluation : bool, default=False
        True: one question a row, at its very end, ending with the last token of the answer.
        False (training): many questions a row, some of them in the middle.
    """

    rows: int
    n_tokens: int
    evaluation: bool = False

    @property
    def room(self) -> int:
        """Tokens left for records and filler."""
        return self.n_tokens - 2


@dataclass(frozen=True, slots=True)
class Answer:
    """A piece of a question record that the model has to produce.

    Parameters
    ----------
    tokens : Tensor or sequence of int
        As every piece: int64 `(B, R)`, `(B, R, k)`, `(1, 1, k)`, or the same k tokens for all records.
    """

    tokens: Tensor | Sequence[int]


Piece = Tensor | Sequence[int] | Answer


@dataclass(frozen=True, slots=True)
class Group:
    """Records of one form.

    Parameters
    ----------
    tokens : Tensor
        int64 `(B, R, k)`.
    answers : Tensor
        bool `(B, R, k)`: tokens the model has to produce.
    order : Tensor
        float32 `(B, R)`: place in the row, 0 at its start, 1 and above at its end, sorted ascending.
    relevant : Tensor or None
        bool `(B, R)`: the records that answer the question (evaluation only).
    """

    tokens: Tensor
    answers: Tensor
    order: Tensor
    relevant: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Records:
    """All records of a batch, padded to one length.

    Parameters
    ----------
    tokens : Tensor
        int64 `(B, R, L)`, 0 behind a record's end.
    lengths : Tensor
        int64 `(B, R)`.
    queries : Tensor
        int64 `(B, R, L)`: 0, or for a token that must be produced the number of its question, from 1.
    order : Tensor
        float32 `(B, R)`, see `Group`.
    relevant : Tensor
        bool `(B, R)`, see `Group`.
    """

    tokens: Tensor
    lengths: Tensor
    queries: Tensor
    order: Tensor
    relevant: Tensor


def record_group(order: Tensor, pieces: Sequence[Piece], relevant: Tensor | None = None) -> Group:
    """Lay pieces side by side into one record per entry of `order`.

    Parameters
    ----------
    order : Tensor
        float32 `(B, R)`, see `Group`.
    pieces : sequence of Piece
        What a record consists of, from left to right.
    relevant : Tensor, optional
        bool `(B, R)`, see `Group`.

    Returns
    -------
    Group
        Records of the summed length of the pieces.
    """
    rows, count = order.shape
    spans, answers = [], []
    for piece in pieces:
        is_answer = isinstance(piece, Answer)
        value = piece.tokens if isinstance(piece, Answer) else piece
        span = value if isinstance(value, Tensor) else torch.tensor(value, dtype=torch.long, device=order.device)
        span = span[..., None] if span.dim() == 2 else span
        span = span.expand(rows, count, span.shape[-1])
        spans.append(span)
        answers.append(torch.full_like(span, fill_value=is_answer, dtype=torch.bool))
    return Group(torch.cat(spans, 2), torch.cat(answers, 2), order, relevant)


def merge(groups: Sequence[Group]) -> Records:
    """Pad groups to one record length and number their questions.

    Parameters
    ----------
    groups : sequence of Group
        All of one B and device.

    Returns
    -------
    Records
        The records in the order of the groups.
    """
    longest = max(group.tokens.shape[2] for group in groups)
    tokens, lengths, queries, relevant = [], [], [], []
    n_queries = 0
    for group in groups:
        rows, count, length = group.tokens.shape
        padding = (0, longest - length)
        tokens.append(functional.pad(group.tokens, padding))
        lengths.append(torch.full((rows, count), length, device=group.tokens.device))
        numbers = torch.arange(count, device=group.tokens.device) + 1 + n_queries
        queries.append(functional.pad(numbers[None, :, None] * group.answers, padding))
        n_queries += count if bool(group.answers.any()) else 0
        none = torch.zeros(rows, count, dtype=torch.bool, device=group.tokens.device)
        relevant.append(none if group.relevant is None else group.relevant)
    order = torch.cat([group.order for group in groups], 1)
    return Records(torch.cat(tokens, 1), torch.cat(lengths, 1), torch.cat(queries, 1), order, torch.cat(relevant, 1))


def select(values: Tensor, chosen: Tensor) -> Tensor:
    """Take the chosen records.

    Parameters
    ----------
    values : Tensor
        `(B, R)` or `(B, R, k)`.
    chosen : Tensor
        int64 `(B, Q)`, indices below R.

    Returns
    -------
    Tensor
        `(B, Q)` or `(B, Q, k)`.
    """
    if values.dim() == 2:
        return values.gather(1, chosen)
    return values.gather(1, chosen[..., None].expand(*chosen.shape, values.shape[2]))


def choose(draw: Draw, request: Request, count: int, questions: int) -> Tensor:
    """Which records are asked about: `questions` different ones of `count`, int64 `(B, questions)`."""
    return draw.uniform(request.rows, count).argsort(1)[:, :questions]


def marks(chosen: Tensor, count: int) -> Tensor:
    """Turn indices `(B, Q)` into a mask, bool `(B, count)`."""
    mask = torch.zeros(len(chosen), count, dtype=torch.bool, device=chosen.device)
    return mask.scatter_(1, chosen, value=True)


def question_order(draw: Draw, request: Request, needles: Tensor, chosen: Tensor, at_end: float = 0.5) -> Tensor:
    """Where the questions stand: at the end, or in training also anywhere behind their needle.

    Parameters
    ----------
    draw : Draw
        Source of randomness.
    request : Request
        Evaluation puts every question at the end.
    needles : Tensor
        float32 `(B, R)`, order of the needles.
    chosen : Tensor
        int64 `(B, Q)`, the needles that are asked.
    at_end : float, default=0.5
        Share of training rows with all questions at the end.

    Returns
    -------
    Tensor
        float32 `(B, Q)`.
    """
    rows, questions = chosen.shape
    if request.evaluation:
        return 1 + draw.uniform(rows, questions)
    start = needles.gather(1, chosen)
    behind = start + (1 - start) * draw.uniform(rows, questions)
    end = 1 + draw.uniform(rows, questions)
    return torch.where(draw.uniform(rows, 1) < at_end, end, behind)
