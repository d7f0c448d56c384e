"""Key-value needles: "the special magic number for amber falcon is : 1 2 3 4 5 .", in RULER's or in random wording."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

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
from icecache.eval.needle.vocabulary import STOP, TOKEN_ID, token_ids

Style = Literal["ruler", "random", "short"]
KeyKind = Literal["two words", "word", "number", "any two"]

KEY_TOKENS: dict[KeyKind, int] = {"two words": 2, "word": 1, "number": 5, "any two": 2}
RANDOM_KEY_KINDS: tuple[KeyKind, ...] = ("two words", "word", "number", "any two")
TRAINING_STYLES: tuple[Style, ...] = ("ruler", "ruler", "random", "random", "short")
SHORT_LINKS = ("=", ">", ":", "is", "-")
MOST_NEEDLES = 4000
# Keys of one word are drawn without repetition from about 290 words.
MOST_WORD_NEEDLES = 200
MOST_QUESTIONS = 64
EVALUATION_NEEDLES = 32


@dataclass(frozen=True, slots=True)
class Wording:
    """Form of the needles of one batch.

    Parameters
    ----------
    style : {"ruler", "random", "short"}
        RULER's sentence, random words around key and value, or "key = value".
    key_kind : str
        What a key is made of, see `KEY_TOKENS`.
    value_tokens : int
        Length of a value.
    word_values : bool
        Values are words, not digits.
    before, between : Tensor
        int64 `(B or 1, 1, k)`: tokens before the key and between key and value.
    asks : list of int
        Tokens that open a question.
    """

    style: Style
    key_kind: KeyKind
    value_tokens: int
    word_values: bool
    before: Tensor
    between: Tensor
    asks: list[int]

    @property
    def needle_tokens(self) -> int:
        """Length of a needle with its full stop."""
        return self.before.shape[2] + KEY_TOKENS[self.key_kind] + self.between.shape[2] + self.value_tokens + 1

    @property
    def question_tokens(self) -> int:
        """Length of a question with its answer and full stop; RULER's names the key twice."""
        repeated = KEY_TOKENS[self.key_kind] + 1 if self.style == "ruler" else 0
        return self.needle_tokens + len(self.asks) + repeated


def draw_wording(draw: Draw, request: Request, style: Style | None) -> Wording:
    """Choose the form of a batch's needles.

    Parameters
    ----------
    draw : Draw
        Source of randomness.
    request : Request
        Rows wanted; evaluation fixes RULER's values to five digits.
    style : Style or None
        None draws one of `TRAINING_STYLES`.

    Returns
    -------
    Wording
        One form for all rows, the random words of "random" apart, which differ from row to row.
    """
    shapes = draw.shapes
    style = style or TRAINING_STYLES[shapes.randrange(0, 5)]

    def fixed(text: str) -> Tensor:
        return torch.tensor(token_ids(text), dtype=torch.long, device=draw.device)[None, None]

    if style == "ruler":
        value_tokens = 5 if request.evaluation else shapes.randrange(4, 8)
        before, between = fixed("the special magic number for"), fixed("is :")
        asks = token_ids("question : what is the special magic number for")
        return Wording(style, "two words", value_tokens, word_values=False, before=before, between=between, asks=asks)
    key_kind = RANDOM_KEY_KINDS[shapes.randrange(0, 4)]
    value_tokens = shapes.randrange(3, 8)
    word_values = shapes.random() < 0.3
    if style == "short":
        before, between, asks = fixed(""), fixed(SHORT_LINKS[shapes.randrange(0, 5)]), []
    else:
        n_before, n_between = shapes.randrange(0, 6), shapes.randrange(1, 4)
        before = draw.pick(draw.words.anything, request.rows, 1, n_before) if n_before else fixed("")
        between = draw.pick(draw.words.anything, request.rows, 1, n_between)
        asks = token_ids("question :")
    return Wording(style, key_kind, value_tokens, word_values, before, between, asks)


def count_needles(draw: Draw, request: Request, wording: Wording, density: float | None) -> tuple[int, int]:
    """How many needles and questions fit.

    Parameters
    ----------
    draw : Draw
        Source of randomness (training draws the number of needles).
    request : Request
        Room wanted; evaluation asks one question about at most 32 needles.
    wording : Wording
        Gives the lengths.
    density : float or None
        Share of the room to fill with needles, instead.

    Returns
    -------
    needles, questions : int
        Both at least 1.
    """
    limit = MOST_WORD_NEEDLES if wording.key_kind == "word" else MOST_NEEDLES
    needle, question, room = wording.needle_tokens, wording.question_tokens, request.room
    if request.evaluation:
        needles = max(1, min(EVALUATION_NEEDLES, room // (needle * 3)))
    else:
        share = 0.15 + 0.75 * float(draw.uniform(1))
        needles = draw.log_uniform_count(max(1, min(limit, int(room * share) // (needle + question))))
    if density is not None:
        needles = max(1, min(limit, int(room * density) // needle))
    questions = 1
    if not request.evaluation:
        questions = max(1, min(needles, MOST_QUESTIONS, (room - needles * needle) // question))
    return max(1, min(needles, (room - questions * question) // needle)), questions


def draw_keys(draw: Draw, rows: int, needles: int, kind: KeyKind) -> Tensor:
    """Keys, int64 `(rows, needles, k)`; word keys are distinct within a row."""
    words = draw.words
    if kind == "two words":
        pair = draw.distinct(rows, needles, len(words.adjectives) * len(words.nouns))
        return torch.stack([words.adjectives[pair // len(words.nouns)], words.nouns[pair % len(words.nouns)]], -1)
    if kind == "word":
        return words.nodes[draw.distinct(rows, needles, len(words.nodes))][..., None]
    if kind == "number":
        return draw.digits(rows, needles, KEY_TOKENS[kind])
    return draw.pick(words.anything, rows, needles, KEY_TOKENS[kind])


def build(draw: Draw, request: Request, style: Style | None = None, density: float | None = None) -> Records:
    """Make needles and questions that repeat a needle's wording up to the value.

    Parameters
    ----------
    draw : Draw
        Source of randomness.
    request : Request
        Rows wanted.
    style : {"ruler", "random", "short"}, optional
        Wording; default: drawn.
    density : float, optional
        Share of the room that needles fill; default: see `count_needles`.

    Returns
    -------
    Records
        Needles, then questions.
    """
    wording = draw_wording(draw, request, style)
    needles, questions = count_needles(draw, request, wording, density)
    keys = draw_keys(draw, request.rows, needles, wording.key_kind)
    if wording.word_values:
        values = draw.pick(draw.words.nodes, request.rows, needles, wording.value_tokens)
    else:
        values = draw.digits(request.rows, needles, wording.value_tokens)
    place = draw.uniform(request.rows, needles)
    chosen = choose(draw, request, needles, questions)
    statements: list[Piece] = [wording.before, keys, wording.between, values, [STOP]]
    asked_key, asked_value = select(keys, chosen), select(values, chosen)
    pieces: list[Piece] = [wording.asks]
    if wording.style == "ruler":
        pieces += [asked_key, [TOKEN_ID["?"]]]
    pieces += [wording.before, asked_key, wording.between, Answer(asked_value)]
    if not request.evaluation:
        pieces.append([STOP])
    relevant = marks(chosen, needles)
    order = question_order(draw, request, place, chosen)
    return merge([record_group(place, statements, relevant), record_group(order, pieces)])
