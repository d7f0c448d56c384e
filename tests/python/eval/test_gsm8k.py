"""GSM8K: prompts and grading equal lm-evaluation-harness where it is installed, and the authors' rules by example."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from icecache.errors import DataError
from icecache.eval.gsm8k import grade
from icecache.eval.gsm8k.suite import AUTHORS, SUITE
from icecache.eval.gsm8k.task import PROMPT_FILE
from icecache.eval.render import render
from icecache.eval.task import DataDir

FIXTURE = Path(__file__).parents[2] / "fixtures" / "gsm8k"
ROWS = [json.loads(line) for line in (FIXTURE / "test.jsonl").open(encoding="utf-8")]
COT, LLAMA = SUITE.tasks
(BY_AUTHORS,) = AUTHORS.tasks
HAS_LM_EVAL = importlib.util.find_spec("lm_eval") is not None
ANSWERS = [
    "7 jars are left. 7 + 3 = 10. The answer is 10.\n\n",
    "The answer is 10",
    "The answer is 1,200.50. The answer is 3.",
    "so $1,200 it is",
    "The final answer is $35",
    "The final answer is 3 and no, The final answer is 28.",
    "-5 or 7-3",
    "no number at all",
    "",
    "#### 300",
    "900.",
    "The answer is $84.",
]


class Plain:
    chat_template = None


def draw(task, data: DataDir | None, n: int = 99) -> list:
    return list(task.samples(Plain(), length=None, n=n, seed=0, data=data))


def test_every_problem_becomes_a_sample() -> None:
    for task in SUITE.tasks:
        samples = draw(task, DataDir(FIXTURE))
        assert [sample.references[0] for sample in samples] == [row["answer"].split("#### ")[1] for row in ROWS]
        assert all(row["question"] in sample.question for row, sample in zip(ROWS, samples, strict=True))
        assert draw(task, DataDir(FIXTURE), 3) == samples[:3]


def test_the_reference_solution_is_graded_right_and_others_wrong() -> None:
    for row, sample in zip(ROWS, draw(COT, DataDir(FIXTURE)), strict=True):
        result = sample.references[0]
        assert COT.score(row["answer"], sample) == 1
        assert COT.grades(f"So. The answer is {result}.\n", sample) == {"strict": 1}
        assert COT.grades(f"So it is {result}.", sample) == {"strict": 0}
        assert COT.score(f"{result} or {int(result.replace(',', '')) + 1}", sample) == 0
        assert LLAMA.grades(f"The final answer is {result}", sample) == {"strict": 1}


@pytest.mark.skipif(not HAS_LM_EVAL, reason="lm-eval is not installed")
@pytest.mark.parametrize(("task", "file"), [(COT, "gsm8k-cot"), (LLAMA, "gsm8k-cot-llama")], ids=["cot", "llama"])
def test_prompts_and_grades_equal_lm_eval(task, file: str) -> None:
    import lm_eval
    import yaml
    from lm_eval.filters.extraction import RegexFilter

    path = Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / f"{file}.yaml"
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    asked = [
        config["doc_to_text"].replace("{{question}}", shot["question"]) for shot in config["fewshot_config"]["samples"]
    ]
    targets = [shot["target"] for shot in config["fewshot_config"]["samples"]]
    space = config.get("target_delimiter", " ")
    text = "".join(f"{a}{space}{t}\n\n" for a, t in zip(asked, targets, strict=True))
    text += config["doc_to_text"].replace("{{question}}", ROWS[0]["question"])
    sample = draw(task, DataDir(FIXTURE), 1)[0]
    rendered = render(sample, Plain())
    assert rendered.context + rendered.question == text
    assert set(config["generation_kwargs"]["until"]) == set(sample.stop)
    for filters, ours in zip(
        config["filter_list"], (grade.strict if task is COT else grade.strict_final, grade.flexible), strict=True
    ):
        settings = {k: v for k, v in filters["filter"][0].items() if k != "function"}
        theirs = RegexFilter(**settings).apply([[answer] for answer in ANSWERS], [{}] * len(ANSWERS))
        assert [ours(answer) or "[invalid]" for answer in ANSWERS] == [found[0] for found in theirs]


@pytest.mark.skipif(not HAS_LM_EVAL, reason="lm-eval is not installed")
def test_numbers_are_compared_as_by_lm_eval() -> None:
    from lm_eval.api.metrics import exact_match_hf_evaluate as exact

    ignored = [",", r"\$", "(?s).*#### ", r"\.$"]
    for number in ["1,200", "$35", "900.", "x #### 7", "3.5", "8"]:
        for result in ["1200", "35", "900", "7", "3.5", "9"]:
            theirs = exact([number], [result], regexes_to_ignore=ignored, ignore_case=True)["exact_match"]
            assert grade.equal(number, result) == theirs


@pytest.mark.parametrize(
    ("answer", "result", "right"),
    [
        ("so 7 + 3 = 10\nQuestion: What is 99?", "10", 1),
        ("1,200 - 300 = 900 hens", "900", 1),
        ("3.50", "3.5", 1),
        ("-5", "5", 1),  # signs are not read
        ("ten", "10", 0),
        ("", "10", 0),
        ("10\nQuestion: 11", "11", 0),
    ],
)
def test_the_authors_compare_the_last_number(answer: str, result: str, right: int) -> None:
    assert grade.authors_equal(answer, result) == right


def test_the_authors_prompt_comes_from_its_file(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_bytes((FIXTURE / "test.jsonl").read_bytes())
    with pytest.raises(DataError, match=rf"needs {PROMPT_FILE} in --data-dir.*gsm8k_cot needs no such file"):
        draw(BY_AUTHORS, DataDir(tmp_path))
    with pytest.raises(DataError, match=PROMPT_FILE):
        draw(BY_AUTHORS, None)
    (tmp_path / PROMPT_FILE).write_text("something else")
    with pytest.raises(DataError, match="holds no 'Question: '"):
        draw(BY_AUTHORS, DataDir(tmp_path))
    (tmp_path / PROMPT_FILE).write_text("Question: 1 + 1?\nLet's think step by step\n2\n")
    data = DataDir(tmp_path)
    sample = draw(BY_AUTHORS, data)[0]
    assert sample.context + sample.question == (
        f"Question: 1 + 1?\nLet's think step by step\n2\n\nQuestion: {ROWS[0]['question']}\n"
    )
    assert set(data.hashes) == {"test.jsonl", PROMPT_FILE}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"question": "q"}', r"test.jsonl:1: expected the fields question and answer as text, got question"),
        ('{"question": "q", "answer": "7"}', r"test.jsonl:1: the answer must end in '#### NUMBER', got '7'"),
    ],
)
def test_a_broken_row_is_named_with_file_and_line(line: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text(line)
    with pytest.raises(DataError, match=message):
        draw(COT, DataDir(tmp_path))


def test_missing_data_names_the_official_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gsm8k/test\.jsonl"):
        draw(COT, DataDir(tmp_path))
