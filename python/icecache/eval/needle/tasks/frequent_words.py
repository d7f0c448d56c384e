"""Most frequent words: every record matters, none alone. Dense aggregation: sparse attention should lose here."""

from __future__ import annotations

import torch

from icecache.eval.needle.draw import Draw
from icecache.eval.needle.records import Answer, Piece, Records, Request, merge, record_group
from icecache.eval.needle.vocabulary import STOP, token_ids

N_ANSWERS = 3
N_CANDIDATES = 40
RECORD_TOKENS = 3


def build(draw: Draw, request: Request) -> Records:
    """Make records "word amber ;" with words drawn from a power law, and ask for the three most frequent.

    Parameters
    ----------
    draw : Draw
        Source of randomness.
    request : Request
        Rows wanted; in evaluation the records fill 30 % of the room.

    Returns
    -------
    Records
        At least 6 records and one question a row. Ties go to the word that was more probable.
    """
    rows = request.rows
    share = 0.3 if request.evaluation else 0.1 + 0.4 * float(draw.uniform(1))
    count = max(6, int((request.room - 20) * share) // RECORD_TOKENS)
    nodes = draw.words.nodes
    candidates = nodes[draw.uniform(rows, len(nodes)).argsort(1)[:, :N_CANDIDATES]]
    rank = torch.arange(N_CANDIDATES, device=draw.device)
    weights = (rank.float() + 1.0).pow(-2.0).expand(rows, N_CANDIDATES)
    drawn = torch.multinomial(weights, count, replacement=True, generator=draw.generator)
    frequency = torch.zeros(rows, N_CANDIDATES, device=draw.device)
    frequency.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float32))
    winners = candidates.gather(1, (frequency - rank * 1e-3).topk(N_ANSWERS, 1).indices)
    record: list[Piece] = [token_ids("word"), candidates.gather(1, drawn), token_ids(";")]
    records = record_group(draw.uniform(rows, count), record)
    pieces: list[Piece] = [token_ids("question : the most frequent words are :"), Answer(winners[:, None])]
    if not request.evaluation:
        pieces.append([STOP])
    return merge([records, record_group(1 + draw.uniform(rows, 1), pieces)])
