"""Middle truncation: a prompt that is too long keeps its first and its last half, decoded and tokenised again."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def truncate_middle(
    tokenizer: PreTrainedTokenizerBase, context: str, question: str, max_tokens: int
) -> tuple[str, str, bool]:
    """Cut the middle out of `context + question`, and say again where the question begins.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        Of the model. Special tokens that it adds count, and are dropped when decoding.
    context, question : str
        The prompt's parts.
    max_tokens : int
        The prompt's tokens; an odd one is lost, as in the published script.

    Returns
    -------
    context, question : str
        As they came if they fit. Otherwise their concatenation is the text of the first and last `max_tokens // 2`
        tokens; the question is at its end unless the tokenizer does not give text back as it was, in which case it is
        what the question's own number of tokens decodes to.
    cut : bool
        Whether anything was cut out.
    """
    ids = list(tokenizer(context + question).input_ids)
    if len(ids) <= max_tokens:
        return context, question, False
    half = max_tokens // 2
    first, last = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:half], ids[len(ids) - half :]))
    if last.endswith(question):
        return first + last[: len(last) - len(question)], question, True
    n_question = min(half, len(tokenizer(question, add_special_tokens=False).input_ids))
    tail = tokenizer.decode(ids[len(ids) - n_question :], skip_special_tokens=True)
    if last.endswith(tail):
        return first + last[: len(last) - len(tail)], tail, True
    return first, last, True
