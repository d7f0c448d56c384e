"""The arms of the demo and what is measured of each: one dense prefill a sample, one index, a fork for every budget.

Prefill and index use all threads. Steps run on one in every arm: the model is so small that a second thread gains
little when idle and costs a multiple when the machine is busy (4k tokens, 2 busy cores: 126 ms against 7 ms a token).
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

import torch

from icecache.config import NARROW_WINDOW_TOKENS
from icecache.demo.options import BUDGETS
from icecache.eval.needle import Sample
from icecache.eval.needle.runner import Outcome, as_prompt, ask
from icecache.eval.prefill import plain_copy, prefill
from icecache.runtime import IceRuntime
from icecache.stats import TraceEvent

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

Kind = Literal["full", "icecache", "streaming"]
LABELS: Final[dict[Kind, str]] = {"full": "full KV", "icecache": "IceCache", "streaming": "StreamingLLM"}


@dataclass(frozen=True, slots=True)
class Arm:
    """One way to attend.

    Parameters
    ----------
    kind : {"full", "icecache", "streaming"}
        Dense attention, our pages, or the first 4 and the newest tokens (StreamingLLM without re-numbering).
    budget : int or None
        Tokens per KV head and step; None for dense attention.
    """

    kind: Kind
    budget: int | None = None

    @property
    def label(self) -> str:
        """Name for tables: "IceCache 128"."""
        return LABELS[self.kind] if self.budget is None else f"{LABELS[self.kind]} {self.budget}"


ARMS: Final = (
    Arm("full"),
    *(Arm("icecache", budget) for budget in BUDGETS),
    *(Arm("streaming", budget) for budget in BUDGETS),
)
# The arm whose page reads are drawn.
TRACED: Final = Arm("icecache", 128)


@dataclass(frozen=True, slots=True)
class Measurement:
    """One arm on one sample.

    Parameters
    ----------
    arm : Arm
        How it attended.
    outcome : Outcome
        What it answered, and the time of its steps.
    attended : float
        Mean tokens attended per KV head, layer and step, the newest token included.
    device_bytes, host_bytes : int
        KV bytes on the compute device and in host pages, at the end.
    prefill_seconds : float
        Dense prefill of the context; shared by all arms of a sample.
    index_seconds : float
        Turning the prefilled cache into the arm's own: pages and index, shared by the budgets of an arm that has them.
    mass_kept : float
        Estimated share of the attention that the attended tokens hold; NaN where nothing estimates it.
    """

    arm: Arm
    outcome: Outcome
    attended: float
    device_bytes: int
    host_bytes: int
    prefill_seconds: float
    index_seconds: float
    mass_kept: float

    @property
    def share(self) -> float:
        """Attended tokens as a share of the sample's tokens."""
        sample = self.outcome.sample
        return self.attended / len(sample.prompt + sample.answer)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Let torch use so many threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Bench:
    """Measures all arms on one sample after the other.

    Parameters
    ----------
    model : PreTrainedModel
        The shipped model, not wrapped.
    tokenizer : PreTrainedTokenizerBase
        Its tokenizer.
    threads : int
        Threads of prefill and index.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, threads: int) -> None:
        self.model, self.tokenizer, self.threads = model, tokenizer, threads
        self.trace: list[TraceEvent] = []

    def measure(self, sample: Sample, *, traced: bool = False) -> Iterator[Measurement | str]:
        """Run every arm on a sample.

        Parameters
        ----------
        sample : Sample
            The question.
        traced : bool, default=False
            Append what the arm `TRACED` reads to `trace`.

        Yields
        ------
        Measurement or str
            "prefill" and "index" when these are done, then one measurement an arm.
        """
        began = time.perf_counter()
        with torch_threads(self.threads):
            prefilled = prefill(self.model, [as_prompt(sample)], "B").cache
        prefill_seconds = time.perf_counter() - began
        yield "prefill"
        base = self._wrap(Arm("icecache", BUDGETS[0]), self.threads)
        with base:
            began = time.perf_counter()
            paged = base.adopt(prefilled)
            index_seconds = time.perf_counter() - began
        yield "index"
        for arm in ARMS:
            with torch_threads(1):
                if arm.kind == "full":
                    measured = self._full(sample, prefilled, prefill_seconds)
                elif arm.kind == "streaming":
                    measured = self._sparse(arm, sample, prefilled, prefill_seconds, None)
                else:
                    keep = self.trace if traced and arm == TRACED else None
                    measured = self._sparse(arm, sample, paged, prefill_seconds, index_seconds, base, keep)
            yield measured

    def _wrap(self, arm: Arm, threads: int = 1) -> IceRuntime:
        # dense_below=0: short demo contexts are to be answered from pages, too. One window for all budgets, that of the
        # smallest, so that all of them can share one index.
        window = NARROW_WINDOW_TOKENS if arm.kind == "icecache" else None
        return IceRuntime.wrap(
            self.model,
            policy=arm.kind,
            budget=arm.budget,
            window_tokens=window,
            dense_below=0,
            sparse_prefill=True,
            threads=threads,
        )

    def _full(self, sample: Sample, prefilled: Cache, prefill_seconds: float) -> Measurement:
        n_context = prefilled.get_seq_length()
        cache = plain_copy(prefilled, self.model)
        (outcome,) = ask(self.model, self.tokenizer, [sample], cache)
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        attended = n_context + (outcome.n_steps + 1) / 2
        return Measurement(Arm("full"), outcome, attended, held, 0, prefill_seconds, 0.0, 1.0)

    def _sparse(
        self,
        arm: Arm,
        sample: Sample,
        source: Cache,
        prefill_seconds: float,
        index_seconds: float | None,
        owner: IceRuntime | None = None,
        keep: list[TraceEvent] | None = None,
    ) -> Measurement:
        """Take over `source` (copy-on-write if it is paged) and answer; `owner` holds the shared pages."""
        with self._wrap(arm) as runtime:
            began = time.perf_counter()
            cache = runtime.adopt(source)
            adopt_seconds = time.perf_counter() - began
            runtime.trace = keep.append if keep is not None else None
            (outcome,) = ask(self.model, self.tokenizer, [sample], cache)
            stats = runtime.stats()
            host_bytes = (owner or runtime).stats().host_bytes
        return Measurement(
            arm=arm,
            outcome=outcome,
            attended=stats.attended_mean,
            device_bytes=stats.device_bytes,
            host_bytes=host_bytes,
            prefill_seconds=prefill_seconds,
            index_seconds=adopt_seconds if index_seconds is None else index_seconds,
            mass_kept=stats.mass_kept,
        )
