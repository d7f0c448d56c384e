"""Passkey: one number, said twice in one place, asked at the end."""

from __future__ import annotations

from icecache.eval.needle.draw import Draw
from icecache.eval.needle.records import Answer, Piece, Records, Request, marks, merge, record_group
from icecache.eval.needle.vocabulary import STOP, token_ids

N_DIGITS = 5


def build(draw: Draw, request: Request) -> Records:
    """Make one needle and one question a row.

    Parameters
    ----------
    draw : Draw
        Source of randomness.
    request : Request
        Rows wanted.

    Returns
    -------
    Records
        "the pass key is 1 2 3 4 5 . remember it . 1 2 3 4 5 is the pass key ." and its question.
    """
    key = draw.digits(request.rows, 1, N_DIGITS)
    place = draw.uniform(request.rows, 1)
    needle = record_group(
        place,
        [token_ids("the pass key is"), key, token_ids(". remember it ."), key, token_ids("is the pass key .")],
        relevant=marks(place.new_zeros(request.rows, 1).long(), 1),
    )
    pieces: list[Piece] = [token_ids("question : what is the pass key ? the pass key is"), Answer(key)]
    if not request.evaluation:
        pieces.append([STOP])
    return merge([needle, record_group(1 + draw.uniform(request.rows, 1), pieces)])
