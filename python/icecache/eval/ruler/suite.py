"""The two suites: `ruler`, in its official form, and `ruler-offline`, for which nothing has to be downloaded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from icecache.eval.ruler.common_words import CommonWords
from icecache.eval.ruler.documents import hotpot, invented, squad
from icecache.eval.ruler.form import Form
from icecache.eval.ruler.frequent_words import FrequentWords
from icecache.eval.ruler.haystack import Prose, essays, synthetic
from icecache.eval.ruler.niah import Niah
from icecache.eval.ruler.questions import Questions
from icecache.eval.ruler.task import RulerTask
from icecache.eval.ruler.variables import Variables
from icecache.eval.ruler.words import installed_words
from icecache.eval.task import DataDir, Suite

SUFFIX: Final = "_synthetic"
LENGTHS: Final = (4096, 8192, 16384)
SAMPLES: Final = 50

# The form of each task that needs essays, given the source of running text.
IN_PROSE: Final[dict[str, Callable[[Prose], Form]]] = {
    "niah_single_2": lambda prose: Niah(installed_words(), prose),
    "niah_single_3": lambda prose: Niah(installed_words(), prose, value="uuids"),
    "niah_multikey_1": lambda prose: Niah(installed_words(), prose, n_keys=4),
    "niah_multivalue": lambda prose: Niah(installed_words(), prose, n_values=4),
    "niah_multiquery": lambda prose: Niah(installed_words(), prose, n_keys=4, n_queries=4),
}
# Tasks whose text is generated anyway: their official form needs no file.
GENERATED: Final[dict[str, Callable[[DataDir | None], Form]]] = {
    "niah_single_1": lambda _: Niah(installed_words()),
    "niah_multikey_2": lambda _: Niah(installed_words(), needle_lines=True),
    "niah_multikey_3": lambda _: Niah(installed_words(), needle_lines=True, key="uuids", value="uuids"),
    "ruler_vt": lambda _: Variables(),
    "ruler_cwe": lambda _: CommonWords(installed_words()),
    "ruler_fwe": lambda _: FrequentWords(),
}
QUESTIONS: Final = {"ruler_qa_1": (squad, 1), "ruler_qa_2": (hotpot, 2)}
# As lm-evaluation-harness names them: other suites have an "fwe" of their own.
ORDER: Final = (
    *("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
    *("niah_multivalue", "niah_multiquery", "ruler_vt", "ruler_cwe", "ruler_fwe", "ruler_qa_1", "ruler_qa_2"),
)


def _official(name: str) -> RulerTask:
    if name in GENERATED:
        return RulerTask(name, GENERATED[name])
    if name in IN_PROSE:
        return RulerTask(name, lambda data: IN_PROSE[name](essays(data)))
    read, _ = QUESTIONS[name]
    return RulerTask(name, lambda data: Questions(read(data)), any_reference=True)


def _offline(name: str) -> RulerTask:
    suite = "ruler-offline"
    if name in GENERATED:
        return RulerTask(name, GENERATED[name])
    if name in IN_PROSE:
        return RulerTask(name + SUFFIX, lambda data: IN_PROSE[name](synthetic(data)), suite=suite)
    _, n_hops = QUESTIONS[name]
    return RulerTask(name + SUFFIX, lambda _: Questions(invented(n_hops)), any_reference=True, suite=suite)


SUITE: Final = Suite(
    name="ruler",
    summary="RULER's 13 tasks; essays, SQuAD and HotpotQA from --data-dir or the hub",
    tasks=tuple(map(_official, ORDER)),
    samples=SAMPLES,
    lengths=LENGTHS,
)
OFFLINE: Final = Suite(
    name="ruler-offline",
    summary="RULER's 13 forms without downloads; where the haystack is not RULER's, the task's name says _synthetic",
    tasks=tuple(map(_offline, ORDER)),
    samples=SAMPLES,
    lengths=LENGTHS,
    label="partly synthetic haystacks",
)
