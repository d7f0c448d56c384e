"""One sample as text: its context abbreviated to the needles, its question, and the answer of each arm."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from typing import Final

from icecache.demo.arms import Measurement
from icecache.eval.needle import Sample
from icecache.eval.needle.vocabulary import text_of

WIDTH: Final = 110
# Words shown before and after each needle, and most needles shown.
AROUND, MOST_NEEDLES = 6, 6


def abbreviated(sample: Sample) -> Iterator[str]:
    """Describe the context line by line.

    Parameters
    ----------
    sample : Sample
        Its evidence is shown between >> and <<, with a few words around it.

    Yields
    ------
    str
        Lines without a line break.
    """
    context = sample.context
    yield f"context ({len(context)} tokens): {text_of(context[:12])} ..."
    for start, stop in sample.evidence[:MOST_NEEDLES]:
        before = text_of(context[max(1, start - AROUND) : start])
        after = text_of(context[stop : stop + AROUND])
        yield f"  at {start:>6}: ... {before} >> {text_of(context[start:stop])} << {after} ..."
    hidden = len(sample.evidence) - MOST_NEEDLES
    if hidden > 0:
        yield f"  and {hidden} more needles"


def spoken(tokens: Sequence[int], sample: Sample) -> str:
    """Write an answer, with the tokens that were given and not produced in brackets."""
    pieces = []
    for is_given, start, stop in sample.segments():
        text = text_of(tokens[start:stop])
        pieces.append(f"[{text}]" if is_given else text)
    return " ".join(pieces)


def showcase(sample: Sample, measurements: Sequence[Measurement]) -> str:
    """Write the sample out.

    Parameters
    ----------
    sample : Sample
        What was asked.
    measurements : sequence of Measurement
        Those of other samples are skipped.

    Returns
    -------
    str
        Several lines.
    """
    lines = [f"One prompt in full ({sample.task}, seed {sample.seed}, row {sample.row})", *abbreviated(sample)]
    lines += [text_of(sample.question), f"expected: {spoken(sample.answer, sample)}"]
    for m in measurements:
        if m.outcome.sample != sample:
            continue
        verdict = "right" if m.outcome.exact_match else "WRONG"
        said = f"{m.arm.label:<16} {verdict}  {spoken(m.outcome.produced, sample)}"
        lines += textwrap.wrap(said, WIDTH, subsequent_indent=" " * 24)
    return "\n".join(lines)
