"""Questions with documents: SQuAD 2.0 and HotpotQA as RULER reads them, and facts of our own."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from icecache.errors import DataError
from icecache.eval.data.hub import load_hub
from icecache.eval.needle.words import FILLER_ADJECTIVES, KEY_ADJECTIVES, KEY_NOUNS, NAMES, TOPICS
from icecache.eval.task import DataDir

SQUAD_FILES: Final = ("squad.json", "ruler/squad.json", "json/squad.json", "dev-v2.0.json")
HOTPOT_FILES: Final = ("hotpotqa.json", "ruler/hotpotqa.json", "json/hotpotqa.json", "hotpot_dev_distractor_v1.json")


@dataclass(frozen=True, slots=True)
class Question:
    """A question, its answers, and where they stand.

    Parameters
    ----------
    text : str
        As asked.
    answers : tuple of str
        Any of them is right.
    documents : tuple of int
        Needed to answer; always part of the prompt.
    related : tuple of int
        Taken first when there is room for more.
    """

    text: str
    answers: tuple[str, ...]
    documents: tuple[int, ...]
    related: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Collection:
    """Documents and questions about them.

    Parameters
    ----------
    source : str
        Written into every sample.
    documents : tuple of str
        Sorted and all different.
    questions : tuple of Question
        In the order of the data.
    """

    source: str
    documents: tuple[str, ...]
    questions: tuple[Question, ...]


def squad(data: DataDir | None) -> Collection:
    """SQuAD 2.0, development set, questions that have an answer.

    Raises
    ------
    DataError
        If it is missing or has another form.
    """
    if data is None:
        return _squad_of(_squad_articles(load_hub("rajpurkar/squad_v2", None, "validation", hint=_hint(SQUAD_FILES))))
    return _read(data, SQUAD_FILES, lambda content: _squad_of(content["data"]))  # type: ignore[index]


def hotpot(data: DataDir | None) -> Collection:
    """HotpotQA, development set with distractors.

    Raises
    ------
    DataError
        If it is missing or has another form.
    """
    if data is None:
        rows = load_hub("hotpotqa/hotpot_qa", "distractor", "validation", hint=_hint(HOTPOT_FILES))
        return _hotpot_of({**row, "context": _pairs(row["context"])} for row in rows)
    return _read(data, HOTPOT_FILES, _hotpot_of)


def _hint(files: Sequence[str]) -> str:
    return (
        f"or give --data-dir with {files[0]}, or take the suite ruler-offline, which has this form with synthetic facts"
    )


def _read(data: DataDir, files: Sequence[str], parse: Callable[[object], Collection]) -> Collection:
    try:
        path: Path = data.find(*files)
    except DataError as error:
        msg = f"{error}; the suite ruler-offline has this form with synthetic facts"
        raise DataError(msg) from error
    try:
        return parse(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        msg = f"{path} does not have the form of {files[0]}: {error!r}"
        raise DataError(msg) from error


def _squad_articles(rows: Iterable[Mapping[str, object]]) -> list[dict[str, object]]:
    """Rows of the hub, one a question, as the nested form of the file."""
    articles: dict[object, dict[object, list[dict[str, object]]]] = {}
    for row in rows:
        answers = row["answers"]
        assert isinstance(answers, Mapping)
        texts = [{"text": text} for text in answers["text"]]
        entry = {"question": row["question"], "answers": texts, "is_impossible": not texts}
        articles.setdefault(row["title"], {}).setdefault(row["context"], []).append(entry)
    return [
        {"paragraphs": [{"context": text, "qas": entries} for text, entries in paragraphs.items()]}
        for paragraphs in articles.values()
    ]


def _squad_of(articles: Iterable[Mapping[str, object]]) -> Collection:
    articles = list(articles)
    paragraphs: list[list[Mapping[str, object]]] = [list(article["paragraphs"]) for article in articles]  # type: ignore[call-overload]
    documents = tuple(sorted({str(p["context"]) for group in paragraphs for p in group}))
    number = {text: i for i, text in enumerate(documents)}
    questions = []
    for group in paragraphs:
        together = [number[str(p["context"])] for p in group]
        for paragraph in group:
            own = number[str(paragraph["context"])]
            related = tuple(i for i in together if i != own)
            for entry in paragraph["qas"]:  # type: ignore[attr-defined]
                if not entry.get("is_impossible", False):
                    answers = tuple(str(answer["text"]) for answer in entry["answers"])
                    questions.append(Question(str(entry["question"]), answers, (own,), related))
    return Collection("squad", documents, tuple(questions))


def _pairs(context: object) -> list[tuple[str, list[str]]]:
    """Titles and sentences of the hub's columns as pairs."""
    assert isinstance(context, Mapping)
    return list(zip(context["title"], context["sentences"], strict=True))


def _hotpot_of(rows: object) -> Collection:
    entries = [(row, [f"{title}\n{''.join(lines)}" for title, lines in row["context"]]) for row in rows]  # type: ignore[attr-defined]
    documents = tuple(sorted({text for _, texts in entries for text in texts}))
    number = {text: i for i, text in enumerate(documents)}
    questions = tuple(
        Question(str(row["question"]), (str(row["answer"]),), tuple(number[text] for text in texts))
        for row, texts in entries
    )
    return Collection("hotpotqa", documents, questions)


def invented(n_hops: int, n_documents: int = 2000) -> Collection:
    """People of our own, a document each: where they live (one hop), or where their teacher lives (two).

    Parameters
    ----------
    n_hops : int
        1 or 2.
    n_documents : int, default=2000
        About 60 words each.
    """
    rng = random.Random(n_hops)
    names = _names(rng, n_documents)
    towns = [f"{adjective}{noun}".capitalize() for adjective in KEY_ADJECTIVES[:60] for noun in KEY_NOUNS[:60]]
    homes = rng.sample(towns, n_documents)
    teachers = [rng.randrange(n_documents) for _ in names]
    documents = tuple(
        f"{name} lives in {home}. {_filler(rng)} The teacher of {name} is {names[teacher]}. {_filler(rng)}"
        for name, home, teacher in zip(names, homes, teachers, strict=True)
    )
    if n_hops == 1:
        questions = [Question(f"Where does {name} live?", (homes[i],), (i,)) for i, name in enumerate(names)]
    else:
        questions = [
            Question(f"Where does the teacher of {name} live?", (homes[t],), tuple(dict.fromkeys((i, t))))
            for i, (name, t) in enumerate(zip(names, teachers, strict=True))
        ]
    rng.shuffle(questions)
    return Collection(f"synthetic-{n_hops}-hop", documents, tuple(questions))


def _names(rng: random.Random, n: int) -> list[str]:
    every = [f"{first.capitalize()} {second.capitalize()}" for first in NAMES for second in KEY_NOUNS]
    return rng.sample(every, n)


def _filler(rng: random.Random) -> str:
    nouns, verbs = (words.split() for words in rng.choice(list(TOPICS.values())))
    return " ".join(
        f"The {rng.choice(FILLER_ADJECTIVES)} {rng.choice(nouns)} {rng.choice(verbs)} near the {rng.choice(nouns)}."
        for _ in range(3)
    )
