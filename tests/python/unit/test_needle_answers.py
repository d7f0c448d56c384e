"""The answers of the needle tasks, worked out again from the text of the prompt alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable

import pytest
from icecache.eval.needle import TASKS, Sample, make_samples
from icecache.eval.needle.vocabulary import text_of

LENGTHS = (256, 512, 3000)
TOTAL_LIMITS = range(1, 100)


def solve_passkey(context: str, _: str) -> str:
    said = re.findall(r"the pass key is ((?:\d ){5}). remember it . ((?:\d ){5})is the pass key .", context)
    assert len(said) == 1
    assert said[0][0] == said[0][1]
    return said[0][0].strip()


def solve_key_value(context: str, question: str) -> str:
    needles = re.findall(r"the special magic number for (\w+ \w+) is : ((?:\d ){5}).", context)
    values = dict(needles)
    assert len(values) == len(needles), "a key stands twice"
    asked = re.fullmatch(r"question : what is .* for (\w+ \w+) \? the special magic number for \1 is :", question)
    assert asked
    return values[asked[1]].strip()


def solve_random_wording(context: str, question: str) -> str:
    wording = question.removeprefix("question : ")
    found = re.findall(rf"(?<= ){re.escape(wording)} ([^.]+?) \.", context)
    assert len(found) == 1
    return found[0]


def solve_variables(context: str, question: str) -> str:
    assigned = re.findall(r"var (\w \w) = (?:var (\w \w)|((?:\d ){5}))", context)
    table = {name: (other, value.strip()) for name, other, value in assigned}
    assert len(table) == len(assigned), "a name stands twice"
    asked = re.fullmatch(r"question : var (\w \w) =", question)
    assert asked
    other, value = table[asked[1]]
    steps = []
    while other:
        steps.append(f"var {other} =")
        other, value = table[other]
    assert len(steps) == 2
    return " ".join([*steps, value])


def digits(number: int) -> str:
    return " ".join(f"{number:02d}")


def solve_sums(context: str, question: str) -> str:
    asked = re.fullmatch(r"question : how many (\w+) does (\w+) have after day (\d) \? answer : start \2 has", question)
    assert asked
    item, name, last_day = asked[1], asked[2], int(asked[3])
    total = int(re.findall(rf"start {name} has (\d) (\d) {item} \.", context)[0][0] + "0")
    total += int(re.findall(rf"start {name} has \d (\d) {item} \.", context)[0])
    lines = [f"{digits(total)} ."]
    for day in range(1, last_day + 1):
        ((verb, amount),) = re.findall(rf"day {day} {name} (\w+) (\d) {item} \.", context)
        sign = "+" if verb in {"buys", "finds", "gets", "earns"} else "-"
        before, total = total, total + int(amount) * (1 if sign == "+" else -1)
        assert total in TOTAL_LIMITS
        lines.append(f"day {day} {name} {verb} {amount} : {digits(before)} {sign} {amount} = {digits(total)} .")
    return " ".join([*lines, f"total {digits(total)}"])


def solve_chase(context: str, question: str) -> str:
    links = re.findall(r"from (\w+) go to (\w+) \.", context)
    after = dict(links)
    assert len(after) == len(links), "a node stands twice"
    asked = re.fullmatch(r"question : start (\w+) \.", question)
    assert asked
    word, hops = asked[1], []
    for _ in range(8):
        word = after[word]
        hops.append(word)
    return " ".join(f"hop {digits(i)} : {word} ." for i, word in enumerate(hops, 1)) + " recall hop"


SOLVERS: dict[str, Callable[[str, str], str]] = {
    "passkey": solve_passkey,
    "kv32": solve_key_value,
    "kv_dense": solve_key_value,
    "kv_rand": solve_random_wording,
    "vt3": solve_variables,
    "gsm": solve_sums,
}


def samples_of(task: str) -> list[Sample]:
    return [sample for length in LENGTHS for sample in make_samples(task, length, 12, seed=length)]


@pytest.mark.parametrize("task", SOLVERS)
def test_the_answer_follows_from_the_prompt(task: str) -> None:
    for sample in samples_of(task):
        expected = SOLVERS[task](text_of(sample.context), text_of(sample.question))
        assert text_of(sample.answer) == expected
        assert not any(sample.given)


def test_the_chase_follows_the_links_and_recalls_one_of_its_own_hops() -> None:
    recalled = set()
    for sample in samples_of("chase8"):
        answer = text_of(sample.answer)
        assert answer.startswith(solve_chase(text_of(sample.context), text_of(sample.question)))
        ((hop, word),) = re.findall(r"recall hop (\d \d) : (\w+)$", answer)
        assert f" hop {hop} : {word} ." in f" {answer}"
        recalled.add(hop)
    assert len(recalled) == 8


def test_the_frequent_words_are_the_most_frequent_but_for_ties() -> None:
    for sample in samples_of("fwe"):
        words = re.findall(r"(?<= )word (\w+) ;", text_of(sample.context))
        counts = Counter(words)
        best = sorted(counts.values(), reverse=True)[:3]
        assert [counts[word] for word in text_of(sample.answer).split()] == best


def test_the_training_tasks_repeat_what_stands_in_the_context() -> None:
    for task in ("mqar", "induct"):
        for sample in samples_of(task):
            assert f" {text_of(sample.question + sample.answer)} " in f" {text_of(sample.context)} "


def test_the_evidence_alone_answers_the_question() -> None:
    for task in (*SOLVERS, "chase8"):
        for sample in samples_of(task):
            evidence = " ".join(["<bos>", *(text_of(sample.context[start:stop]) for start, stop in sample.evidence)])
            solve = SOLVERS.get(task, solve_chase)
            assert text_of(sample.answer).startswith(solve(evidence, text_of(sample.question)))


def test_every_task_of_the_table_is_covered_here() -> None:
    assert {*SOLVERS, "chase8", "fwe", "mqar", "induct"} == set(TASKS)
