"""Multi-query associative recall: one-token keys and values. It makes induction heads form early in training."""

from __future__ import annotations

from icecache.eval.needle.draw import Draw
from icecache.eval.needle.records import (
    Answer,
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
from icecache.eval.needle.vocabulary import STOP, TOKEN_ID

MOST_PAIRS = 200
EVALUATION_PAIRS = 32


def build(draw: Draw, request: Request) -> Records:
    """Make pairs and ask each of them once (evaluation: one of them).

    Parameters
    ----------
    draw : Draw
        Source of randomness.
    request : Request
        Rows wanted.

    Returns
    -------
    Records
        "key value" pairs with distinct keys, then the questions in the same form.
    """
    shapes, rows = draw.shapes, request.rows
    separator: list[int] = [] if request.evaluation else shapes.choice([[], [], [STOP], [TOKEN_ID[";"]]])
    limit = max(2, min(MOST_PAIRS, request.room // (2 * (2 + len(separator)))))
    pairs = min(limit, EVALUATION_PAIRS) if request.evaluation else shapes.randrange(max(2, limit // 4), limit + 1)
    keys = draw.words.nodes[draw.distinct(rows, pairs, len(draw.words.nodes))]
    if shapes.random() < 0.6:
        values = draw.pick(draw.words.anything, rows, pairs)
    else:
        values = draw.digits(rows, pairs, 1)[..., 0]
    place = draw.uniform(rows, pairs)
    chosen = choose(draw, request, pairs, 1 if request.evaluation else pairs)
    statements: list[Piece] = [keys, values, separator]
    pieces: list[Piece] = [select(keys, chosen), Answer(select(values, chosen)), separator]
    order = question_order(draw, request, place, chosen)
    return merge([record_group(place, statements, marks(chosen, pairs)), record_group(order, pieces)])
