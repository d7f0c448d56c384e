"""RULER's forms: a reader with rules instead of a model answers from the prompts alone and gets full marks."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path

import pytest
from icecache.errors import ConfigError, DataError
from icecache.eval.needle import load_needle
from icecache.eval.render import encode, render
from icecache.eval.ruler import suite as ruler
from icecache.eval.ruler.fit import largest
from icecache.eval.ruler.score import match_all, match_any
from icecache.eval.ruler.suite import OFFLINE, ORDER, SUITE
from icecache.eval.ruler.words import installed_words, own_words
from icecache.eval.task import DataDir
from solvers import solver

GOLDEN = Path(__file__).parents[2] / "golden" / "ruler_prompts.json"
TASKS = {task.name: task for task in OFFLINE.tasks}
OFFICIAL = {task.name: task for task in SUITE.tasks}


@pytest.fixture(autouse=True)
def _own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ruler, "installed_words", own_words)


@pytest.fixture(scope="module")
def tokenizer():
    return load_needle()[1]


@pytest.fixture
def official_files(tmp_path: Path) -> DataDir:
    """Files of RULER's forms with our own text."""
    essay = " ".join(f"Thought {i} was written down by nobody. Was it {i * 7}?" for i in range(900))
    (tmp_path / "PaulGrahamEssays.json").write_text(json.dumps({"text": essay}))
    entry = {"question": "Who kept bees?", "answers": [{"text": "Mara"}, {"text": "the mayor"}], "is_impossible": False}
    never = {"question": "Who kept cows?", "answers": [], "is_impossible": True}
    paragraphs = [{"context": f"Mara kept bees in year {i}.", "qas": [never, entry]} for i in range(30)]
    other = [{"context": f"Filler {i} about nothing at all.", "qas": []} for i in range(60)]
    (tmp_path / "squad.json").write_text(json.dumps({"data": [{"paragraphs": paragraphs}, {"paragraphs": other}]}))
    rows = [
        {
            "question": f"Which river {i}?",
            "answer": f"River{i}",
            "context": [[f"T{i}", ["A. ", f"River{i}."]], ["U", ["B."]]],
        }
        for i in range(40)
    ]
    (tmp_path / "hotpotqa.json").write_text(json.dumps(rows))
    return DataDir(tmp_path)


@pytest.mark.parametrize("name", TASKS)
@pytest.mark.parametrize("length", [1024, 4096])
def test_the_prompt_alone_answers_the_question_and_fits_the_length(name: str, length: int, tokenizer) -> None:
    task = TASKS[name]
    samples = list(task.samples(tokenizer, length=length, n=3, seed=7, data=None))
    assert len({sample.context for sample in samples}) == len(samples) == 3
    for sample in samples:
        answer = solver(name)(sample)
        assert sorted(answer) == sorted(sample.references)
        assert task.score("The answer: " + ", ".join(answer).upper(), sample) == 1.0
        assert task.score("nothing of that", sample) == 0.0
        assert sum(map(len, encode(render(sample, tokenizer), tokenizer))) + sample.max_new_tokens <= length
        assert sample.meta["length"] == length


@pytest.mark.parametrize("name", TASKS)
def test_a_sample_depends_on_seed_and_index_but_not_on_how_many_are_drawn(name: str, tokenizer) -> None:
    def draw(n: int, seed: int) -> list:
        return list(TASKS[name].samples(tokenizer, length=1024, n=n, seed=seed, data=None))

    assert draw(3, 1)[:1] == draw(1, 1)
    assert draw(1, 1)[0].context != draw(1, 2)[0].context


@pytest.mark.parametrize("name", TASKS)
def test_prompts_are_those_of_the_golden_file(name: str, tokenizer) -> None:
    samples = TASKS[name].samples(tokenizer, length=1024, n=3, seed=0, data=None)
    hashes = [hashlib.sha256((s.context + s.question + s.answer_prefix).encode()).hexdigest() for s in samples]
    assert hashes == json.loads(GOLDEN.read_text())[name]


@pytest.mark.parametrize("name", ["niah_single_1", "niah_multikey_2", "niah_single_2_synthetic"])
def test_a_single_needle_stands_where_the_sample_says(name: str, tokenizer) -> None:
    for sample in TASKS[name].samples(tokenizer, length=4096, n=6, seed=3, data=None):
        body = sample.context.split("afterwards.\n", 1)[1]
        assert abs(body.index(sample.references[0]) / len(body) - sample.meta["depth"]) < 0.05


def test_official_names_use_official_files_only(official_files: DataDir, tokenizer) -> None:
    assert tuple(OFFICIAL) == ORDER
    for name in ORDER:
        sample = next(OFFICIAL[name].samples(tokenizer, length=2048, n=1, seed=0, data=official_files))
        assert sample.meta.get("haystack") not in {"synthetic-grammar", "synthetic-1-hop", "synthetic-2-hop"}
    assert set(official_files.hashes) == {"PaulGrahamEssays.json", "squad.json", "hotpotqa.json"}


def test_questions_with_official_files_keep_their_own_documents(official_files: DataDir, tokenizer) -> None:
    for sample in OFFICIAL["ruler_qa_1"].samples(tokenizer, length=600, n=3, seed=0, data=official_files):
        assert sample.references == ("Mara", "the mayor")
        assert sample.context.count("kept bees in year") >= 1
        assert OFFICIAL["ruler_qa_1"].score("It was The Mayor.", sample) == 1.0
    for i, sample in enumerate(OFFICIAL["ruler_qa_2"].samples(tokenizer, length=400, n=3, seed=0, data=official_files)):
        assert f"T{i}\nA. River{i}." in sample.context


@pytest.mark.parametrize("name", ["niah_single_2", "ruler_qa_1", "ruler_qa_2"])
def test_missing_and_broken_files_are_named(name: str, tmp_path: Path, tokenizer) -> None:
    data = DataDir(tmp_path)
    file = {"niah_single_2": "PaulGrahamEssays.json", "ruler_qa_1": "squad.json", "ruler_qa_2": "hotpotqa.json"}[name]
    with pytest.raises(DataError, match=rf"{file}.*ruler-offline"):
        next(OFFICIAL[name].samples(tokenizer, length=2048, n=1, seed=0, data=data))
    (tmp_path / file).write_text('[{"other": 1}]')
    with pytest.raises(DataError, match=file):
        next(OFFICIAL[name].samples(tokenizer, length=2048, n=1, seed=0, data=data))


def test_a_length_too_short_for_the_form_is_an_error(tokenizer) -> None:
    with pytest.raises(ConfigError, match="ruler_cwe does not fit 300 tokens"):
        next(TASKS["ruler_cwe"].samples(tokenizer, length=300, n=1, seed=0, data=None))


def test_own_text_replaces_the_grammar_and_is_said(tmp_path: Path, tokenizer) -> None:
    (tmp_path / "haystack.txt").write_text("Rain fell. " * 50)
    sample = next(TASKS["niah_single_2_synthetic"].samples(tokenizer, length=512, n=1, seed=0, data=DataDir(tmp_path)))
    assert sample.meta["haystack"] == "haystack.txt"
    assert sample.context.count("Rain fell.") > 50


@pytest.mark.parametrize("limit", [*range(3, 40), 1000])
@pytest.mark.parametrize("step", [1, 4])
def test_the_search_finds_what_trying_all_sizes_finds(limit: int, step: int) -> None:
    for most in (None, 3, 17, 35):
        tried = list(range(3, min(limit, most or limit) + 1, step))
        assert largest(lambda s: s <= limit, least=3, step=step, most=most) == tried[-1]


def test_scores_follow_the_published_formulas() -> None:
    assert match_all("a: ONE\x01two", ("one", "Two", "three", "four")) == 0.5
    assert match_any("see TWO", ("one", "two")) == 1.0
    assert match_any("", ("one",)) == 0.0


@pytest.mark.skipif(not importlib.util.find_spec("lm_eval"), reason="lm-eval is not installed")
def test_wordings_are_those_of_lm_eval() -> None:
    from icecache.eval.ruler import common_words, frequent_words, variables
    from lm_eval.tasks.ruler import cwe_utils, fwe_utils, vt_utils

    theirs = vt_utils.CONFIG["variable_tracking"]
    ours = variables.TASK_LINE + "{context}\n" + variables.QUESTION
    assert theirs["template"].replace("{query}", "{value}") == ours
    assert theirs["answer_prefix"].replace("{query}", "{value}").replace("{num_v}", "{n}") == variables.PREFIX
    for module, config in ((common_words, cwe_utils.CONFIG), (frequent_words, fwe_utils.CONFIG)):
        assert config["template"] == module.TASK_LINE + "{context}\n" + module.QUESTION
        assert config["answer_prefix"] == module.PREFIX


@pytest.mark.skipif(not importlib.util.find_spec("wonderwords"), reason="wonderwords is not installed")
def test_with_wonderwords_the_words_are_rulers() -> None:
    words = installed_words()
    assert words.source == "wonderwords"
    assert min(map(len, (words.adjectives, words.nouns))) > 800
    if importlib.util.find_spec("lm_eval"):
        from lm_eval.tasks.ruler import cwe_utils

        assert sorted(cwe_utils.WORDS) == list(words.singles)
