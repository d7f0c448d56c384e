"""Prompts of the harness: parts go in and come out, and the wording of its tasks shows where the question begins."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
from icecache.cli import main
from icecache.errors import DataError
from icecache.eval.harness.marks import hold_conversation, mark, read_sample
from icecache.eval.longbench.sets import SETS
from icecache.eval.task import Sample

FIXTURE = Path(__file__).parents[2] / "fixtures" / "longbench" / "data"


def blank(task: str = "t", **options: object) -> Sample:
    return Sample(task, "0", "", "", (), 8, **options)


def test_a_sample_goes_through_one_string() -> None:
    sample = replace(blank(), context="the text\n", question="What?", answer_prefix=" It is")
    assert read_sample(mark(sample), blank()) == sample
    assert read_sample(mark(replace(sample, answer_prefix="")), blank()) == replace(sample, answer_prefix="")


def test_a_conversation_becomes_shots_system_message_and_prefix() -> None:
    messages = [
        ("system", "be brief"),
        ("user", "1+1"),
        ("assistant", "2"),
        ("user", "text\ue000ask"),
        ("assistant", "So"),
    ]
    text = hold_conversation([{"role": r, "content": c} for r, c in messages], is_open=True)
    sample = read_sample(text, blank())
    assert (sample.system, sample.shots, sample.answer_prefix) == ("be brief", (("1+1", "2"),), "So")
    assert (sample.context, sample.question, sample.chat) == ("text", "ask", True)
    plain = read_sample(hold_conversation([{"role": "user", "content": "Hello"}], is_open=False), blank(chat=False))
    assert (plain.question, plain.chat) == ("Hello", False)


@pytest.mark.parametrize("roles", [[], ["user", "assistant"], ["user", "user"]])
def test_a_conversation_must_end_with_the_user(roles: list[str]) -> None:
    with pytest.raises(DataError, match="end with the user"):
        read_sample(hold_conversation([{"role": r, "content": "x"} for r in roles], is_open=False), blank())


def test_text_without_marks_is_written_as_it_is() -> None:
    sample = read_sample("Q: 1\nA: 1\n\nQ: 2\nA:", blank("gsm8k_cot"))
    assert (sample.context, sample.question, sample.chat) == ("Q: 1\nA: 1\n\n", "Q: 2\nA:", False)
    assert read_sample("anything", blank("hellaswag")).context == ""


@pytest.mark.parametrize("chosen", SETS, ids=lambda each: each.name)
def test_the_question_of_a_longbench_prompt_is_found_by_its_wording(chosen) -> None:
    for line in (FIXTURE / f"{chosen.name}.jsonl").open(encoding="utf-8"):
        row = json.loads(line)
        # As lm-eval words it: no blank line in two sets, no blank or line break at the end.
        template = chosen.template.replace("\n\n{input}", "\n{input}") if not chosen.chat else chosen.template
        sample = read_sample(template.rstrip().format(**row), blank(f"longbench_{chosen.name}"))
        assert row["context"] in sample.context
        assert row["input"] in (sample.context if chosen.name == "repobench-p" else sample.question)


@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is not None, reason="lm-eval is installed")
def test_without_lm_eval_the_command_says_what_to_install(tmp_path: Path, capsys) -> None:
    assert main(["eval", "harness", "--out", str(tmp_path / "out"), "--tasks", "gsm8k_cot"]) == 1
    assert "pip install icecache[eval]" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
