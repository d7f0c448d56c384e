"""Filler text, and the assembly of records and filler into rows.

Dimension key: B rows of a batch, R records of a row, L tokens of the longest record, T tokens of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

import torch
from torch import Tensor

from icecache.eval.needle.draw import Draw
from icecache.eval.needle.records import Records
from icecache.eval.needle.vocabulary import BOS, STOP, token_ids

FillerKind = Literal["topic", "noise", "random"]

NOISE: Final = "the grass is green . the sky is blue . the sun is yellow . here we go . there and back again ."
# N: noun of the topic, V: verb of the topic, A: adjective.
TEMPLATES: Final = (
    "the A N V near the N .",
    "a N and a N V .",
    "in the N , the A N V .",
    "when the N V , the N V .",
    "the N of the A N was A .",
    "some A N V after the N .",
    "this N is A and that N is A .",
    "the N V .",
)
PLACEHOLDERS: Final = {"N": -1, "V": -2, "A": -3}
ABSENT: Final = -9
# Kinds of filler by one uniform draw a row: topic sentences below .7, the noise text below .85, loose words above.
NOISE_FROM, RANDOM_FROM = 0.7, 0.85
KIND_DRAW: Final[dict[FillerKind, float]] = {"topic": 0.0, "noise": 0.75, "random": 0.95}


@dataclass(frozen=True, slots=True)
class Rows:
    """A batch of finished rows.

    Parameters
    ----------
    tokens : Tensor
        int64 `(B, T)`, first token `<bos>`.
    queries : Tensor
        int64 `(B, T)`: 0, or the number of the question that this token answers, from 1.
    relevant : Tensor
        bool `(B, T)`: tokens of the records that answer the question (evaluation only).
    question_start : int
        Position of the last record, in evaluation the question.
    """

    tokens: Tensor
    queries: Tensor
    relevant: Tensor
    question_start: int


class Haystack:
    """A long stream of filler that rows are cut from.

    Parameters
    ----------
    draw : Draw
        Source of randomness.
    stream_tokens : int
        Length of the stream to aim for; rows must be shorter.
    """

    def __init__(self, draw: Draw, stream_tokens: int) -> None:
        self.draw = draw
        self.stream_tokens = stream_tokens
        codes = [[PLACEHOLDERS.get(word) or token_ids(word)[0] for word in text.split()] for text in TEMPLATES]
        longest = max(map(len, codes))
        padded = [code + [ABSENT] * (longest - len(code)) for code in codes]
        self.templates = torch.tensor(padded, device=draw.device)
        self.noise = torch.tensor(token_ids(NOISE), device=draw.device)
        self.refresh()

    def refresh(self) -> None:
        """Write a new stream: template sentences that keep to a topic for about eight sentences."""
        draw, words = self.draw, self.draw.words
        n_sentences = self.stream_tokens // 7 + 16
        chosen = draw.integers(0, len(self.templates), n_sentences)
        stretch = (draw.uniform(n_sentences) < 0.12).long().cumsum(0)
        topic = draw.integers(0, len(words.topic_nouns), n_sentences)[stretch][:, None]
        sentences = self.templates[chosen]
        shape = sentences.shape
        nouns = words.topic_nouns[topic, draw.integers(0, words.topic_nouns.shape[1], *shape)]
        # A few nouns and adjectives of the keys, so that a key's words alone do not give the needle away.
        key_nouns = draw.pick(words.nouns, *shape)
        nouns = torch.where(draw.uniform(*shape) < 0.06, key_nouns, nouns)
        verbs = words.topic_verbs[topic, draw.integers(0, words.topic_verbs.shape[1], *shape)]
        is_key = draw.uniform(*shape) < 0.06
        key_adjectives = draw.pick(words.adjectives, *shape)
        adjectives = torch.where(is_key, key_adjectives, draw.pick(words.filler_adjectives, *shape))
        for letter, values in (("N", nouns), ("V", verbs), ("A", adjectives)):
            sentences = torch.where(sentences == PLACEHOLDERS[letter], values, sentences)
        self.stream = sentences[sentences != ABSENT]

    def filler(self, rows: int, n_tokens: int, kind: FillerKind | None = None) -> Tensor:
        """Filler for a batch.

        Parameters
        ----------
        rows, n_tokens : int
            Shape of the result.
        kind : {"topic", "noise", "random"}, optional
            One kind for all rows; default: each row draws its own, in shares .7, .15, .15.

        Returns
        -------
        Tensor
            int64 `(rows, n_tokens)`.

        Raises
        ------
        ValueError
            If the stream is shorter than a row.
        """
        draw = self.draw
        if len(self.stream) < n_tokens + 2:
            msg = f"n_tokens must be below the stream's length {len(self.stream)} - 1, got {n_tokens}"
            raise ValueError(msg)
        steps = torch.arange(n_tokens, device=draw.device)
        offset = draw.integers(0, len(self.stream) - n_tokens - 1, rows)
        sentences = self.stream[offset[:, None] + steps]
        which = draw.uniform(rows) if kind is None else torch.full((rows,), KIND_DRAW[kind], device=draw.device)
        start = draw.integers(0, len(self.noise), rows)
        noise = self.noise[(start[:, None] + steps) % len(self.noise)]
        loose = draw.pick(draw.words.filler, rows, n_tokens)
        loose = torch.where(draw.uniform(rows, n_tokens) < 0.12, STOP, loose)
        which = which[:, None]
        return torch.where(which < NOISE_FROM, sentences, torch.where(which < RANDOM_FROM, noise, loose))

    def assemble(self, records: Records, n_tokens: int, kind: FillerKind | None = None) -> Rows:
        """Insert records into filler at sentence ends, by their order.

        Parameters
        ----------
        records : Records
            What to insert.
        n_tokens : int
            Length T of the rows.
        kind : {"topic", "noise", "random"}, optional
            Kind of filler, see `filler`.

        Returns
        -------
        Rows
            Rows of exactly T tokens; records that do not fit are cut at the end.
        """
        rank = records.order.argsort(1)
        wide = rank[..., None].expand(records.tokens.shape)
        order, lengths = records.order.gather(1, rank), records.lengths.gather(1, rank)
        filler = self.filler(len(order), n_tokens, kind)
        start = record_starts(filler, order, lengths)
        step = torch.arange(records.tokens.shape[2], device=order.device)
        inside = step < lengths[..., None]
        positions = torch.where(inside, start[..., None] + step, n_tokens).clamp(max=n_tokens).flatten(1)

        def scatter(values: Tensor) -> Tensor:
            # One slot too many: everything behind a record's end or the row's end lands there.
            row = torch.zeros(len(values), n_tokens + 1, dtype=values.dtype, device=values.device)
            return row.scatter_(1, positions, values.flatten(1))[:, :n_tokens]

        taken = scatter(torch.ones_like(wide, dtype=torch.bool))
        taken[:, 0] = True
        fill_index = ((~taken).long().cumsum(1) - 1).clamp_min(0)
        tokens = torch.where(taken, scatter(records.tokens.gather(1, wide)), filler.gather(1, fill_index))
        tokens[:, 0] = BOS
        relevant = scatter(records.relevant.gather(1, rank)[..., None].expand(records.tokens.shape) & inside)
        return Rows(tokens, scatter(records.queries.gather(1, wide)), relevant, int(start[0, -1]))


def record_starts(filler: Tensor, order: Tensor, lengths: Tensor) -> Tensor:
    """Position of each record's first token.

    Parameters
    ----------
    filler : Tensor
        int64 `(B, T)`.
    order : Tensor
        float32 `(B, R)`, ascending: 0 is the row's start, 1 and above its end.
    lengths : Tensor
        int64 `(B, R)`.

    Returns
    -------
    Tensor
        int64 `(B, R)`. A record starts behind a full stop of the filler, behind `<bos>` or behind another record.
    """
    n_tokens = filler.shape[1]
    steps = torch.arange(n_tokens, device=filler.device)
    after_stop = torch.where(filler == STOP, steps + 1, n_tokens)
    next_boundary = after_stop.flip(1).cummin(1).values.flip(1)
    n_filler = (n_tokens - 1 - lengths.sum(1, keepdim=True)).clamp_min(0)
    wanted = (order.clamp(0, 1) * n_filler).long()
    before = torch.minimum(next_boundary.gather(1, (wanted - 1).clamp(0, n_tokens - 1)), n_filler)
    before = torch.where(order <= 0, 0, torch.where(order >= 1, n_filler, before))
    return 1 + before + lengths.cumsum(1) - lengths
