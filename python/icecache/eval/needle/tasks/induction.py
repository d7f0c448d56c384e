"""Induction: a span of random words comes again, and its first two words call for the rest. A training task."""

from __future__ import annotations

import torch

from icecache.eval.needle.draw import Draw
from icecache.eval.needle.records import Answer, Records, Request, marks, merge, question_order, record_group

GIVEN_TOKENS = 2
MOST_SPANS = 24


def build(draw: Draw, request: Request) -> Records:
    """Make spans of 6 to 24 words and repeat each (evaluation: the first) later in the row.

    Parameters
    ----------
    draw : Draw
        Source of randomness.
    request : Request
        Rows wanted.

    Returns
    -------
    Records
        Spans, then their repetitions, of which all but the first two words must be produced.
    """
    length = draw.shapes.randrange(6, 25)
    count = max(1, min(MOST_SPANS, request.room // (2 * length)))
    pool = draw.words.anything if draw.shapes.random() < 0.7 else draw.words.nodes
    spans = draw.pick(pool, request.rows, count, length)
    place = draw.uniform(request.rows, count)
    repeated = 1 if request.evaluation else count
    chosen = torch.arange(repeated, device=draw.device).expand(request.rows, repeated)
    again = spans[:, :repeated]
    order = question_order(draw, request, place, chosen, at_end=0.3)
    question = record_group(order, [again[..., :GIVEN_TOKENS], Answer(again[..., GIVEN_TOKENS:])])
    return merge([record_group(place, [spans], marks(chosen, count)), question])
