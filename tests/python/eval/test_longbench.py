"""LongBench: prompts, truncation, data formats, and scores that equal the published ones on golden triples."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from icecache.errors import ConfigError, DataError
from icecache.eval.longbench.metrics import METRICS, code_difflib
from icecache.eval.longbench.sets import BY_NAME, ENGLISH, SETS
from icecache.eval.longbench.suite import AUTHORS, CLEAN, SUITE
from icecache.eval.longbench.truncate import truncate_middle
from icecache.eval.needle import load_needle
from icecache.eval.render import encode, render
from icecache.eval.task import DataDir

FIXTURE = Path(__file__).parents[2] / "fixtures" / "longbench"
GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "longbench_scores.json").read_text(encoding="utf-8"))
TASKS = {task.name: task for task in SUITE.tasks}
HAS_JIEBA = importlib.util.find_spec("jieba") is not None
HAS_PARQUET = importlib.util.find_spec("datasets") is not None


class Letters:
    """A tokenizer that gives every text back: a token is a character, with one special token in front."""

    chat_template = None
    bos_token_id = 0
    name_or_path = "meta-llama/Llama-3.1-8B-Instruct"
    is_fast = False  # characters have no offsets here; the renderer says so once

    def __call__(self, text: str, add_special_tokens: bool = True, **_: object) -> object:
        ids = [0] * add_special_tokens + [ord(c) for c in text]
        return type("Encoding", (dict,), {"input_ids": ids})(input_ids=ids)

    def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
        return "".join(chr(i) for i in ids if i or not skip_special_tokens)


@pytest.fixture
def data() -> DataDir:
    return DataDir(FIXTURE)


def draw(task, data: DataDir, tokenizer=None, length: int | None = None, n: int = 9) -> list:
    return list(task.samples(tokenizer or Letters(), length=length, n=n, seed=0, data=data))


def needs_jieba(name: str) -> bool:
    return BY_NAME[name].metric in {"qa_f1_zh", "rouge_zh"} and not HAS_JIEBA


@pytest.mark.parametrize("index", range(len(GOLDEN)))
def test_scores_equal_the_published_functions(index: int) -> None:
    triple = GOLDEN[index]
    if triple["metric"] in {"qa_f1_zh", "rouge_zh"} and not HAS_JIEBA:
        pytest.skip("jieba is not installed")
    score = {**METRICS, "difflib": code_difflib}[triple["metric"]]
    best = max(score(triple["prediction"], reference, triple["classes"]) for reference in triple["references"])
    assert best == pytest.approx(triple["score"], abs=1e-12)


def test_the_golden_triples_cover_every_score() -> None:
    assert len(GOLDEN) >= 30
    assert {triple["metric"] for triple in GOLDEN} == {*METRICS, "difflib"}


@pytest.mark.skipif(not importlib.util.find_spec("lm_eval") or not HAS_JIEBA, reason="lm-eval is not installed")
def test_scores_equal_those_of_lm_eval_on_the_fixture(data: DataDir) -> None:
    pytest.importorskip("fuzzywuzzy")  # their module imports it
    from lm_eval.tasks.longbench import metrics as theirs

    names = {"qa_f1": "qa_f1", "qa_f1_zh": "qa_f1_zh", "rouge": "rouge", "rouge_zh": "rouge_zh", "count": "count"}
    names |= {"classification": "classification", "retrieval": "retrieval", "retrieval_zh": "retrieval_zh"}
    for task in SUITE.tasks:
        if task.of.metric == "code":
            continue  # they skip empty lines and take difflib
        for sample in draw(task, data):
            classes = json.loads(str(sample.meta.get("classes", "[]")))
            for answer in (
                "Paragraph 13 段落3 4",
                sample.references[0],
                f"I think {sample.references[-1]} or City",
                "",
            ):
                score = getattr(theirs, f"get_{names[task.of.metric]}_score")
                doc = {"answers": list(sample.references), "all_classes": classes}
                expected = next(iter(score(doc, [answer]).values()))
                assert task.score(answer, sample) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("chosen", SETS, ids=lambda each: each.name)
def test_the_prompt_is_the_template_filled_in(chosen, data: DataDir) -> None:
    if needs_jieba(chosen.name):
        pytest.skip("jieba is not installed")
    rows = [json.loads(line) for line in (FIXTURE / "data" / f"{chosen.name}.jsonl").open(encoding="utf-8")]
    samples = draw(TASKS[chosen.name], data)
    assert len(samples) == len(rows) == 2
    for row, sample in zip(rows, samples, strict=True):
        assert sample.context + sample.question == chosen.template.format(**row)
        assert sample.context.endswith(row["context"])
        assert sample.references == tuple(row["answers"])
        assert TASKS[chosen.name].score(row["answers"][0], sample) == pytest.approx(1, abs=1e-6)
        assert sample.max_new_tokens == chosen.new_tokens
        assert sample.chat == (chosen.name not in {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"})


def test_sixteen_english_sets_run_by_default() -> None:
    assert len(SETS) == 21
    assert len(ENGLISH) == len(SUITE.default_tasks) == 16


@pytest.mark.skipif(not importlib.util.find_spec("lm_eval"), reason="lm-eval is not installed")
def test_prompts_are_those_of_lm_eval_but_for_the_known_differences() -> None:
    import lm_eval
    import yaml

    # A blank line before the dialogue or passage, and a final space or line break, are missing there.
    known = {"samsum", "triviaqa", "lcc", "repobench-p", "passage_count", "passage_retrieval_en"}
    folder = Path(lm_eval.__file__).parent / "tasks" / "longbench"
    for each in SETS:
        text = (folder / f"{each.name}.yaml").read_text(encoding="utf-8").replace("!function", "")
        theirs = (
            yaml.safe_load(text)["doc_to_text"].replace("{{", "{").replace("}}", "}").replace("question}", "input}")
        )
        if each.name in known:
            assert theirs != each.template
            assert theirs.split() == each.template.split()
        else:
            assert theirs == each.template


@pytest.mark.parametrize("extra", [1, 2, 57, 400])
def test_truncation_keeps_the_two_ends(extra: int) -> None:
    context, question = "<" + "abcdefghij" * 80, " What is it? "
    whole = context + question
    limit = len(whole) + 1 - extra
    cut_context, cut_question, cut = truncate_middle(Letters(), context, question, limit)
    half = limit // 2
    assert cut
    assert cut_question == question
    # The special token in front counts towards the first half, as in the published script.
    assert cut_context + cut_question == whole[: half - 1] + whole[-half:]
    assert truncate_middle(Letters(), context, question, len(whole) + 1) == (context, question, False)


def test_a_tokenizer_that_changes_the_text_still_yields_a_question() -> None:
    tokenizer = load_needle()[1]
    context, question, cut = truncate_middle(tokenizer, "the grass is green . " * 60, "what is  the key ?", 100)
    assert cut
    assert question.split() == ["what", "is", "the", "key", "?"]
    assert len(tokenizer(context + " " + question).input_ids) <= 101


def test_a_question_longer_than_half_takes_the_whole_last_half() -> None:
    context, question, cut = truncate_middle(Letters(), "c" * 100, "q" * 90, 60)
    assert cut
    assert (context, question) == ("c" * 29, "q" * 30)


def test_only_the_first_line_counts_where_the_protocol_says_so(data: DataDir) -> None:
    trec, hotpot = draw(TASKS["trec"], data)[0], draw(TASKS["hotpotqa"], data)[0]
    assert TASKS["trec"].score("\n\nCity\nDate Food", trec) == 1
    assert TASKS["trec"].score("City Date\nFood", trec) == 0.5
    assert TASKS["hotpotqa"].score("no\nMount Hedda", hotpot) == pytest.approx(0.8)


def test_samsum_stops_at_a_line_break_after_at_least_one_token(data: DataDir) -> None:
    sample = draw(TASKS["samsum"], data)[0]
    assert (sample.stop, sample.min_new_tokens) == (("\n",), 1)
    assert draw(TASKS["trec"], data)[0].stop == ()
    clean = {task.name: task for task in CLEAN.tasks}["clean/trec"]
    assert draw(clean, data)[0].stop == ("\n",)


def test_code_is_also_graded_by_difflib(data: DataDir) -> None:
    sample = replace(draw(TASKS["lcc"], data)[0], references=("while i < n: i += 1",))
    answer = "# a loop\nfor i in range(n): pass"
    assert set(TASKS["lcc"].grades(answer, sample)) == {"difflib"}
    assert TASKS["lcc"].grades(answer, sample)["difflib"] != TASKS["lcc"].score(answer, sample)


def test_the_authors_protocol_adds_a_system_message_and_a_second_bos(data: DataDir) -> None:
    task = {task.name: task for task in AUTHORS.tasks}["authors/qasper"]
    sample = draw(task, data)[0]
    assert (sample.system, sample.double_bos) == ("You are a helpful assistant.", True)
    assert draw(TASKS["qasper"], data)[0].double_bos is False


def test_the_clean_protocol_leaves_room_for_the_answer(data: DataDir) -> None:
    task = {task.name: task for task in CLEAN.tasks}["clean/qasper"]
    for sample in draw(task, data, length=500):
        assert sum(map(len, encode(render(sample, Letters()), Letters()))) + sample.max_new_tokens <= 500
        assert sample.meta["truncated"] == 1
    with pytest.raises(ConfigError, match="needs more than 100 tokens"):
        draw(task, data, length=100)


@pytest.mark.skipif(not HAS_PARQUET, reason="datasets is not installed")
def test_the_parquet_mirror_and_saved_data_sets_give_the_same_samples(tmp_path: Path, data: DataDir) -> None:
    from datasets import Dataset

    rows = [json.loads(line) for line in (FIXTURE / "data" / "qasper.jsonl").open(encoding="utf-8")]
    mirror = Dataset.from_list([{("question" if k == "input" else k): v for k, v in row.items()} for row in rows])
    mirror.save_to_disk(tmp_path / "a" / "qasper")
    (tmp_path / "b" / "qasper").mkdir(parents=True)
    mirror.to_parquet(tmp_path / "b" / "qasper" / "test-00000-of-00001.parquet")
    (tmp_path / "c").mkdir()
    mirror.to_parquet(tmp_path / "c" / "qasper.parquet")
    for folder in "abc":
        assert draw(TASKS["qasper"], DataDir(tmp_path / folder)) == draw(TASKS["qasper"], data)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"input": "q", "answers": ["a"]}', r"qasper.jsonl:2: field 'context' must be text, got nothing"),
        ('{"context": "c", "answers": ["a"]}', r":2: field 'input' must be text, got nothing"),
        ('{"context": "c", "input": "q", "answers": []}', r":2: field 'answers' must be a list"),
        ('{"context": "c", "input": "q", "answers": ["a"], "all_classes": "x"}', r":2: field 'all_classes'"),
        ("{not json", r":2: not JSON"),
        ("[1]", r":2: expected a JSON object, got list"),
    ],
)
def test_a_broken_row_is_named_with_file_and_line(line: str, message: str, tmp_path: Path) -> None:
    good = (FIXTURE / "data" / "qasper.jsonl").read_text(encoding="utf-8").splitlines()[0]
    (tmp_path / "qasper.jsonl").write_text(f"{good}\n{line}\n", encoding="utf-8")
    with pytest.raises(DataError, match=message):
        draw(TASKS["qasper"], DataDir(tmp_path))


def test_missing_data_names_the_official_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data/qasper\.jsonl"):
        draw(TASKS["qasper"], DataDir(tmp_path))


def test_an_answer_without_a_paragraph_is_found_before_a_model_runs(tmp_path: Path) -> None:
    shutil.copytree(FIXTURE, tmp_path / "x")
    file = tmp_path / "x" / "data" / "passage_retrieval_en.jsonl"
    file.write_text(file.read_text(encoding="utf-8").replace('Paragraph 13"]', '13"]'), encoding="utf-8")
    with pytest.raises(DataError, match="name no paragraph"):
        draw(TASKS["passage_retrieval_en"], DataDir(tmp_path / "x"))
