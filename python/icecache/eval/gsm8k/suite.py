"""The suites: GSM8K as lm-evaluation-harness words it, and as the paper's authors do."""

from __future__ import annotations

from typing import Final

from icecache.eval.gsm8k.task import Gsm8kAuthors, Gsm8kCot, Gsm8kLlama
from icecache.eval.task import Suite

SAMPLES: Final = 1319
"""Problems of the test set."""

SUITE: Final = Suite(
    name="gsm8k",
    summary="GSM8K, chain of thought with 8 examples, strict and flexible; gsm8k_cot_llama as a conversation",
    tasks=(Gsm8kCot(), Gsm8kLlama()),
    samples=SAMPLES,
    default_tasks=("gsm8k_cot",),
)
AUTHORS: Final = Suite(
    name="gsm8k-authors",
    summary="GSM8K as the paper's script runs it; needs its prompt file in --data-dir",
    tasks=(Gsm8kAuthors(),),
    samples=SAMPLES,
)
