"""What a prompt of the harness, which is one string, says about its parts.

U+E000 stands between context and question, U+E001 before the beginning of the answer; U+E002 starts a conversation
whose chat template is not applied yet, as JSON: so each task can have the template or not, and `<bos>` stands once.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from icecache.errors import DataError
from icecache.eval.longbench.sets import SETS
from icecache.eval.render import BOUNDARY
from icecache.eval.task import Sample

ANSWER: Final = "\ue001"
CONVERSATION: Final = "\ue002"

# Where the question of a task of lm-eval begins: the last place of this text. Tasks are named by their beginning.
# Few-shot sets of LongBench ask behind their examples; the others have an order of their own there.
BY_EXAMPLE: Final = {
    "trec": "\nQuestion: ",
    "triviaqa": "\nPassage:",
    "samsum": "\nDialogue: ",
    "lsht": "\n新闻内容：",
    "repobench-p": "Next line of code:",
}
QUESTIONS: Final = (
    ("niah_", "\nWhat "),
    ("ruler_", "\nQuestion: "),
    ("gsm8k_cot_llama", "Given the following problem, reason"),
    ("gsm8k", "Q: "),
    *((f"longbench_{s.name}", BY_EXAMPLE.get(s.name) or s.after.partition("{input}")[0].rstrip()) for s in SETS),
)


def is_without_template(task: str) -> bool:
    """Whether it is one of the six sets of LongBench that models with a chat template get without it."""
    return task.startswith(tuple(f"longbench_{s.name}" for s in SETS if not s.chat))


def mark(sample: Sample) -> str:
    """Write a sample's prompt as one string; shots and system message travel beside it."""
    end = ANSWER + sample.answer_prefix if sample.answer_prefix else ""
    return f"{sample.context}{BOUNDARY}{sample.question}{end}"


def hold_conversation(messages: Sequence[Mapping[str, str]], *, is_open: bool) -> str:
    """Write a conversation as one string, for a template that is applied later."""
    held = {"messages": [[m["role"], m["content"]] for m in messages], "is_open": is_open}
    return CONVERSATION + json.dumps(held, ensure_ascii=False)


def read_sample(text: str, blank: Sample) -> Sample:
    """Read a prompt back.

    Parameters
    ----------
    text : str
        From `mark`, from `hold_conversation`, or a task's own.
    blank : Sample
        Everything else; its chat flag says whether a conversation gets the template.

    Returns
    -------
    Sample
        Without a boundary mark the question begins where `QUESTIONS` says; without an entry there, all is question.

    Raises
    ------
    DataError
        If a conversation does not end with a user's message.
    """
    if not text.startswith(CONVERSATION):
        return _split(text, blank if BOUNDARY in text else replace(blank, chat=False))
    held = json.loads(text.removeprefix(CONVERSATION))
    messages = [(str(role), str(content)) for role, content in held["messages"]]
    prefix = messages.pop()[1] if held["is_open"] else ""
    has_system = bool(messages) and messages[0][0] == "system"
    system = messages.pop(0)[1] if has_system else ""
    asked = messages.pop() if messages else ("nobody", "")
    shots = tuple((user[1], answer[1]) for user, answer in zip(messages[::2], messages[1::2], strict=False))
    if asked[0] != "user" or len(messages) % 2:
        msg = f"{blank.task}: the conversation must be user and assistant in turns and end with the user"
        raise DataError(msg)
    sample = replace(blank, system=system, shots=shots)
    if not sample.chat and system:
        sample = replace(sample, system="", context=f"{system}\n\n")
    return _split(asked[1] + (ANSWER + prefix if prefix else ""), sample)


def _split(text: str, sample: Sample) -> Sample:
    text, _, prefix = text.partition(ANSWER)
    context, boundary, question = text.partition(BOUNDARY)
    if not boundary:
        place = text.rfind(_question_of(sample.task)) if _question_of(sample.task) else 0
        context, question = text[: max(0, place)], text[max(0, place) :]
    return replace(sample, context=sample.context + context, question=question, answer_prefix=prefix)


def _question_of(task: str) -> str:
    return next((text for name, text in QUESTIONS if task.startswith(name)), "")
