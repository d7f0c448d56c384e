"""LongBench's scores of one answer against one reference, as published, faults included.

All functions take the answer, the reference and the set's classes (used by one of them), and give 0 to 1.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import ModuleType
from typing import Final

from icecache.errors import DataError

Score = Callable[[str, str, Sequence[str]], float]

ARTICLES: Final = re.compile(r"\b(a|an|the)\b")
NUMBER: Final = re.compile(r"\d+")
CHINESE_MARKS: Final = (
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣"
    "､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."
)
MARKS: Final = frozenset(string.punctuation)
ALL_MARKS: Final = frozenset(string.punctuation + CHINESE_MARKS)


def _package(name: str) -> ModuleType:
    """Import a package that defines a score."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        msg = f"this score is defined by the package {name}: `pip install icecache[eval]` ({error})"
        raise DataError(msg) from error


def normal_words(text: str) -> list[str]:
    """Words in lower case without punctuation and articles, as SQuAD compares answers."""
    plain = "".join(c for c in text.lower() if c not in MARKS)
    return ARTICLES.sub(" ", plain).split()


def chinese_words(text: str) -> list[str]:
    """Words as `jieba` cuts them, without marks and white space.

    Raises
    ------
    DataError
        If `jieba` is not installed.
    """
    plain = ("".join("".join(c for c in word.lower() if c not in ALL_MARKS).split()) for word in _cut(text))
    return [word for word in plain if word]


def _cut(text: str) -> list[str]:
    jieba = _package("jieba")
    jieba.setLogLevel("WARNING")
    return list(jieba.cut(text, cut_all=False))


def token_f1(answer: Sequence[str], reference: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of the words, each counted as often as it stands there."""
    shared = sum((Counter(answer) & Counter(reference)).values())
    if not shared:
        return 0.0
    precision, recall = shared / len(answer), shared / len(reference)
    return 2 * precision * recall / (precision + recall)


def qa_f1(answer: str, reference: str, _: Sequence[str]) -> float:
    """Token F1 after SQuAD's normalisation."""
    return token_f1(normal_words(answer), normal_words(reference))


def qa_f1_zh(answer: str, reference: str, _: Sequence[str]) -> float:
    """Token F1 of Chinese words."""
    return token_f1(chinese_words(answer), chinese_words(reference))


@functools.cache
def _rouge_l() -> Callable[[str, str], float]:
    rouge = _package("rouge").Rouge(metrics=["rouge-l"])

    def score(answer: str, reference: str) -> float:
        try:
            return float(rouge.get_scores([answer], [reference], avg=True)["rouge-l"]["f"])
        except (ValueError, RecursionError):  # an empty answer; the published script gives 0 for any error
            return 0.0

    return score


def rouge(answer: str, reference: str, _: Sequence[str]) -> float:
    """Rouge-L F1 of the package `rouge` (not of `rouge-score`, whose values differ)."""
    return _rouge_l()(answer, reference)


def rouge_zh(answer: str, reference: str, _: Sequence[str]) -> float:
    """Rouge-L F1 of Chinese words."""
    return _rouge_l()(" ".join(_cut(answer)), " ".join(_cut(reference)))


def classification(answer: str, reference: str, classes: Sequence[str]) -> float:
    """1 / number of classes named in the answer, if the right one is among them.

    Classes whose name is part of the right one's are not to count, but the published loop removes from the list it goes
    over and so leaves out every class behind a removed one. Kept for parity.
    """
    named = [name for name in classes if name in answer]
    for name in named:
        if name in reference and name != reference:
            named.remove(name)
    return 1 / len(named) if reference in named else 0.0


def _share(answer: str, right: str) -> float:
    numbers = NUMBER.findall(answer)
    return sum(number == right for number in numbers) / len(numbers) if numbers else 0.0


def retrieval(answer: str, reference: str, _: Sequence[str]) -> float:
    """Share of the answer's numbers that are the right paragraph's ("Paragraph 7")."""
    return _share(answer, re.findall(r"Paragraph (\d+)", reference)[0])


def retrieval_zh(answer: str, reference: str, _: Sequence[str]) -> float:
    """Share of the answer's numbers that are the right paragraph's ("段落7")."""
    return _share(answer, re.findall(r"段落(\d+)", reference)[0])


def count(answer: str, reference: str, _: Sequence[str]) -> float:
    """Share of the answer's numbers that are the right one."""
    return _share(answer, str(reference))


def code_line(answer: str) -> str:
    """First line without a comment sign or a backtick; empty if there is none."""
    lines = answer.lstrip("\n").split("\n")
    return next((line for line in lines if not any(sign in line for sign in ("`", "#", "//"))), "")


def code(answer: str, reference: str, _: Sequence[str]) -> float:
    """Similarity of the first line of code: `fuzzywuzzy.ratio` with Levenshtein installed, in whole per cents.

    Without it, `fuzzywuzzy` takes difflib's ratio, which differs: :func:`code_difflib`.
    """
    fuzz = _package("rapidfuzz.fuzz")
    line = code_line(answer)
    if line == reference or not (line and reference):
        return float(line == reference)
    return round(float(fuzz.ratio(line, reference))) / 100


def code_difflib(answer: str, reference: str, _: Sequence[str]) -> float:
    """Similarity of the first line of code, by difflib: what LongBench's own requirements lead to."""
    line = code_line(answer)
    if line == reference or not (line and reference):
        return float(line == reference)
    return round(100 * difflib.SequenceMatcher(None, line, reference).ratio()) / 100


METRICS: Final[Mapping[str, Score]] = {
    "qa_f1": qa_f1,
    "qa_f1_zh": qa_f1_zh,
    "rouge": rouge,
    "rouge_zh": rouge_zh,
    "classification": classification,
    "retrieval": retrieval,
    "retrieval_zh": retrieval_zh,
    "count": count,
    "code": code,
}
NAMES: Final[Mapping[str, str]] = {
    "qa_f1": "token F1",
    "qa_f1_zh": "token F1 (jieba)",
    "rouge": "Rouge-L",
    "rouge_zh": "Rouge-L (jieba)",
    "classification": "class accuracy",
    "retrieval": "share of right numbers",
    "retrieval_zh": "share of right numbers",
    "count": "share of right numbers",
    "code": "edit similarity",
}
