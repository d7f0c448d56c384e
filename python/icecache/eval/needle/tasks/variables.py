"""Variable tracking: "var A B = 1 2 3 4 5 . var C D = var A B . ..."; the answer walks the chain back."""

from __future__ import annotations

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
from icecache.eval.needle.vocabulary import STOP, TOKEN_ID, token_ids

VAR, EQUALS = TOKEN_ID["var"], TOKEN_ID["="]
N_DIGITS = 5
N_LETTERS = 26
MOST_VARIABLES = 600
MOST_QUESTIONS = 32
EVALUATION_HOPS = 3
EVALUATION_CHAINS = 8


def count_chains(draw: Draw, request: Request, hops: int) -> tuple[int, int]:
    """How many chains of `hops` variables and questions fit; both at least 1."""
    question_tokens, chain_tokens = 17 + 4 * hops, 10 + 8 * (hops - 1)
    share = 0.3 if request.evaluation else 0.7
    limit = int(request.room * share) // (chain_tokens + question_tokens // 2)
    limit = max(1, min(MOST_VARIABLES // hops, limit))
    chains = min(limit, EVALUATION_CHAINS) if request.evaluation else draw.log_uniform_count(limit)
    chains = max(1, min(chains, (request.room - question_tokens) // chain_tokens))
    if request.evaluation:
        return chains, 1
    return chains, max(1, min(chains, MOST_QUESTIONS, (request.room - chains * chain_tokens) // question_tokens))


def statements(names: Tensor, values: Tensor, place: Tensor, relevant: Tensor) -> list[Group]:
    """One group of records a hop: the first variable gets a value, each later one its predecessor.

    Parameters
    ----------
    names : Tensor
        int64 `(B, chains, hops, 2)`.
    values : Tensor
        int64 `(B, chains, 5)`.
    place : Tensor
        float32 `(B, chains, hops)`.
    relevant : Tensor
        bool `(B, chains)`.

    Returns
    -------
    list of Group
        `hops` groups of `chains` records a row.
    """
    pieces: list[Piece] = [[VAR], names[:, :, 0], [EQUALS], values, [STOP]]
    groups = [record_group(place[:, :, 0], pieces, relevant)]
    for hop in range(1, names.shape[2]):
        pieces = [[VAR], names[:, :, hop], [EQUALS], [VAR], names[:, :, hop - 1], [STOP]]
        groups.append(record_group(place[:, :, hop], pieces, relevant))
    return groups


def build(draw: Draw, request: Request) -> Records:
    """Make chains of variables and questions about their last ones.

    Parameters
    ----------
    draw : Draw
        Source of randomness.
    request : Request
        Rows wanted; evaluation asks about one of up to 8 chains of 3 variables, told in order.

    Returns
    -------
    Records
        Assignments hop by hop, then questions "question : var E F = var C D = var A B = 1 2 3 4 5".
    """
    hops = EVALUATION_HOPS if request.evaluation else draw.shapes.randrange(2, 5)
    chains, questions = count_chains(draw, request, hops)
    code = draw.distinct(request.rows, chains * hops, N_LETTERS**2).view(request.rows, chains, hops)
    letters = draw.words.letters
    names = torch.stack([letters[code // N_LETTERS], letters[code % N_LETTERS]], -1)
    values = draw.digits(request.rows, chains, N_DIGITS)
    place = draw.uniform(request.rows, chains, hops)
    if draw.shapes.random() < 0.5 or request.evaluation:
        place = place.sort(2).values
    chosen = choose(draw, request, chains, questions)
    groups = statements(names, values, place, marks(chosen, chains))
    asked = select(names.flatten(2), chosen).view(*chosen.shape, hops, 2)
    pieces: list[Piece] = [token_ids("question :"), [VAR], asked[:, :, -1], [EQUALS]]
    for hop in reversed(range(hops - 1)):
        pieces += [Answer([VAR]), Answer(asked[:, :, hop]), Answer([EQUALS])]
    pieces.append(Answer(select(values, chosen)))
    if not request.evaluation:
        pieces.append([STOP])
    order = question_order(draw, request, place.max(2).values, chosen)
    return merge([*groups, record_group(order, pieces)])
