"""One arm answers a batch whose context is prefilled: what both engines do with a prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

from icecache.config import IceConfig
from icecache.eval.arms import Arm
from icecache.eval.greedy import Answer, answer_greedily
from icecache.eval.prefill import Prefilled, attend
from icecache.eval.record import ArmStats

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def ask(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, arm: Arm, base: IceConfig, prefilled: Prefilled
) -> tuple[list[Answer], ArmStats]:
    """Answer greedily.

    Parameters
    ----------
    model : PreTrainedModel
        Not wrapped.
    tokenizer : PreTrainedTokenizerBase
        Of the model.
    arm : Arm
        Policy and budget.
    base : IceConfig
        Settings, dense layers included.
    prefilled : Prefilled
        The batch; it stays as it was, for the next arm.

    Returns
    -------
    answers : list of Answer
        One a row.
    stats : ArmStats
        What was read, and times.
    """
    with attend(model, arm, base, prefilled) as session:
        n_first = session.cache.get_seq_length()
        answers, timing = answer_greedily(model, tokenizer, prefilled.prompts, session.cache, prefilled.setup)
        n_steps = session.cache.get_seq_length() - n_first
        stats = session.stats(
            n_first,
            n_steps,
            len(prefilled.prompts),
            ttft_s=prefilled.seconds + session.adopt_s + timing.first_s,
            tpot_s=timing.rest_s / max(1, timing.n_rest),
        )
    return answers, stats
