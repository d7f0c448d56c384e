"""Chain-of-thought sums: who starts with how many, what each day adds or takes; the answer works it out day by day."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from icecache.eval.needle.draw import Draw
from icecache.eval.needle.records import (
    Answer,
    Group,
    Piece,
    Records,
    Request,
    choose,
    marks,
    merge,
    question_order,
    record_group,
    select,
)
from icecache.eval.needle.vocabulary import STOP, TOKEN_ID, ZERO, token_ids

START_TOKENS, DAY_TOKENS = 7, 9
MOST_QUESTIONS = 8
EVALUATION_DAYS = 4
EVALUATION_PEOPLE = 8


@dataclass(frozen=True, slots=True)
class Ledger:
    """What happens to the people of a batch. B rows, E people, S days.

    Parameters
    ----------
    names, items : Tensor
        int64 `(B, E)`, tokens.
    totals : list of Tensor
        S + 1 tensors int64 `(B, E, 2)`: the two digits of the total before the first and after each day.
    verbs, amounts, signs : list of Tensor
        S tensors int64 `(B, E)`: the verb, the digit and "+" or "-" of each day.
    """

    names: Tensor
    items: Tensor
    totals: list[Tensor]
    verbs: list[Tensor]
    amounts: list[Tensor]
    signs: list[Tensor]


def two_digits(number: Tensor) -> Tensor:
    """Tokens of a number below 100, `(...,)` -> `(..., 2)`."""
    return torch.stack([number // 10, number % 10], -1) + ZERO


def day_name(day: int) -> list[int]:
    """Tokens of "day 3"."""
    return [TOKEN_ID["day"], ZERO + day]


def draw_ledger(draw: Draw, rows: int, people: int, days: int) -> Ledger:
    """Draw people, items and transactions; totals stay within 1 .. 99.

    Parameters
    ----------
    draw : Draw
        Source of randomness.
    rows, people, days : int
        Sizes.

    Returns
    -------
    Ledger
        Names are distinct within a row; half of the batches give everybody the same item.
    """
    words = draw.words
    names = words.names[draw.distinct(rows, people, len(words.names))]
    if draw.shapes.random() < 0.5:
        items = draw.pick(words.items, rows, 1).expand(rows, people)
    else:
        items = draw.pick(words.items, rows, people)
    total = draw.integers(20, 80, rows, people)
    totals, verbs, amounts, signs = [two_digits(total)], [], [], []
    for _ in range(days):
        amount = draw.integers(1, 10, rows, people)
        gains = draw.uniform(rows, people) < 0.5
        gains = (gains | (total < 10)) & (total <= 89)
        gain_verbs, loss_verbs = draw.pick(words.gains, rows, people), draw.pick(words.losses, rows, people)
        total = torch.where(gains, total + amount, total - amount)
        totals.append(two_digits(total))
        verbs.append(torch.where(gains, gain_verbs, loss_verbs))
        amounts.append(amount + ZERO)
        signs.append(torch.where(gains, TOKEN_ID["+"], TOKEN_ID["-"]))
    return Ledger(names, items, totals, verbs, amounts, signs)


def statements(ledger: Ledger, place: Tensor, relevant: Tensor) -> list[Group]:
    """Write records "start tom has 4 2 coins ." and "day 1 tom buys 3 coins .".

    Parameters
    ----------
    ledger : Ledger
        What happens.
    place : Tensor
        float32 `(B, E, S + 1)`.
    relevant : Tensor
        bool `(B, E)`.

    Returns
    -------
    list of Group
        S + 1 groups of E records a row.
    """
    pieces: list[Piece] = [token_ids("start"), ledger.names, token_ids("has"), ledger.totals[0], ledger.items, [STOP]]
    groups = [record_group(place[..., 0], pieces, relevant)]
    for day, (verb, amount) in enumerate(zip(ledger.verbs, ledger.amounts, strict=True)):
        pieces = [day_name(day + 1), ledger.names, verb, amount, ledger.items, [STOP]]
        groups.append(record_group(place[..., day + 1], pieces, relevant))
    return groups


def worked_answer(ledger: Ledger, chosen: Tensor, days: int) -> list[Piece]:
    """Pieces of "4 2 . day 1 tom buys 3 : 4 2 + 3 = 4 5 . ... total 4 5", all to be produced."""
    names = select(ledger.names, chosen)
    pieces: list[Piece] = [Answer(select(ledger.totals[0], chosen)), Answer([STOP])]
    for day in range(days):
        amount = select(ledger.amounts[day], chosen)
        pieces += [Answer(day_name(day + 1)), Answer(names), Answer(select(ledger.verbs[day], chosen)), Answer(amount)]
        pieces += [Answer(token_ids(":")), Answer(select(ledger.totals[day], chosen))]
        pieces += [Answer(select(ledger.signs[day], chosen)), Answer(amount), Answer(token_ids("="))]
        pieces += [Answer(select(ledger.totals[day + 1], chosen)), Answer([STOP])]
    return [*pieces, Answer(token_ids("total")), Answer(select(ledger.totals[days], chosen))]


def build(draw: Draw, request: Request, days: int | None = None) -> Records:
    """Make ledgers and questions about one person's total after a day.

    Parameters
    ----------
    draw : Draw
        Source of randomness.
    request : Request
        Rows wanted; evaluation asks about one of up to 8 people, after the last day.
    days : int, optional
        Days recorded, at most 9; default 4 in evaluation, 1 to 5 in training.

    Returns
    -------
    Records
        Records day by day, then questions.
    """
    training, shapes = not request.evaluation, draw.shapes
    days = days or (shapes.randrange(1, 6) if training else EVALUATION_DAYS)
    days_asked = shapes.randrange(1, days + 1) if training else days
    person_tokens = START_TOKENS + DAY_TOKENS * days
    question_tokens = 28 + days_asked * 19
    fitting = int(request.room * (0.6 if training else 0.3)) // (person_tokens + question_tokens // 3)
    fitting = max(1, min(len(draw.words.names), fitting))
    people = 1 + shapes.randrange(0, fitting) if training else min(fitting, EVALUATION_PEOPLE)
    people = max(1, min(people, (request.room - question_tokens) // person_tokens))
    questions = 1
    if training:
        questions = max(1, min(people, MOST_QUESTIONS, (request.room - people * person_tokens) // question_tokens))
    ledger = draw_ledger(draw, request.rows, people, days)
    place = draw.uniform(request.rows, people, days + 1).sort(2).values
    if training and shapes.random() < 0.3:
        place = draw.uniform(request.rows, people, days + 1)
    chosen = choose(draw, request, people, questions)
    names, items = select(ledger.names, chosen), select(ledger.items, chosen)
    pieces: list[Piece] = [token_ids("question : how many"), items, token_ids("does"), names, token_ids("have after")]
    pieces += [day_name(days_asked), token_ids("? answer : start"), names, token_ids("has")]
    pieces += worked_answer(ledger, chosen, days_asked)
    if training:
        pieces.append(Answer([STOP]))
    order = question_order(draw, request, place.max(2).values, chosen)
    return merge([*statements(ledger, place, marks(chosen, people)), record_group(order, pieces)])
