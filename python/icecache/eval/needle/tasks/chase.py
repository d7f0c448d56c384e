"""Pointer chase with recall: follow "from amber go to falcon ." hop by hop, then recall a hop just generated.

The recalled word stands in the generated text only: it tests that generated tokens can be found again.
"""

from __future__ import annotations

import torch
from torch import Tensor

from icecache.eval.needle.draw import Draw
from icecache.eval.needle.records import Answer, Piece, Records, Request, merge, record_group
from icecache.eval.needle.vocabulary import STOP, ZERO, token_ids

LINK_TOKENS = 7
MOST_LINKS = 200
EVALUATION_HOPS = 8


def hop_number(hop: Tensor | int) -> Tensor:
    """Two digits of a hop's number, int64 `(..., 2)`."""
    number = torch.as_tensor(hop)
    return torch.stack([number // 10, number % 10], -1) + ZERO


def count_links(draw: Draw, request: Request, hops: int) -> int:
    """Length of the cycle: as many links as 30 % of the room holds (training: 20 to 70 %), 2 to 200."""
    share = 0.3 if request.evaluation else 0.2 + 0.5 * float(draw.uniform(1))
    question_tokens = 14 + 5 * hops
    fitting = min(int(request.room * share) // LINK_TOKENS, (request.room - question_tokens) // 6)
    return max(2, min(MOST_LINKS, fitting))


def build(draw: Draw, request: Request) -> Records:
    """Make one random cycle of words a row and follow it from a random start.

    Parameters
    ----------
    draw : Draw
        Source of randomness.
    request : Request
        Rows wanted; evaluation follows 8 hops (2 when only two links fit).

    Returns
    -------
    Records
        Links, then "question : start w . hop 0 1 : x . ... recall hop 0 3 : y", the recall's opening being given.
    """
    hops = EVALUATION_HOPS if request.evaluation else draw.shapes.randrange(2, 17)
    links = count_links(draw, request, hops)
    hops = min(hops, 2) if links <= 2 else hops
    cycle = draw.words.nodes[draw.distinct(request.rows, links, len(draw.words.nodes))]
    start = draw.integers(0, links, request.rows, 1)

    def word_after(hop: Tensor | int) -> Tensor:
        return cycle.gather(1, (start + hop) % links)

    pieces: list[Piece] = [token_ids("question : start"), word_after(0), [STOP]]
    for hop in range(1, hops + 1):
        number = Answer(hop_number(hop).tolist())
        pieces += [Answer(token_ids("hop")), number, Answer(token_ids(":")), Answer(word_after(hop)), Answer([STOP])]
    recalled = draw.integers(1, hops + 1, request.rows, 1)
    pieces += [token_ids("recall hop"), hop_number(recalled), token_ids(":"), Answer(word_after(recalled))]
    if not request.evaluation:
        pieces.append([STOP])
    followed = (torch.arange(links, device=draw.device) - start) % links < hops
    link: list[Piece] = [token_ids("from"), cycle, token_ids("go to"), cycle.roll(-1, 1), [STOP]]
    links_group = record_group(draw.uniform(request.rows, links), link, followed)
    return merge([links_group, record_group(1 + draw.uniform(request.rows, 1), pieces)])
