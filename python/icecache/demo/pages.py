"""Figure: where in the context each KV head read, step by step.

Dimension key: S steps, H KV heads, K pages, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl
import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from icecache.demo.arms import TRACED
from icecache.demo.plots import COLOURS, FAINT, STYLE
from icecache.eval.needle import Sample
from icecache.stats import TraceEvent

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HIT, NEEDLE, NEAR = "#d7263d", "#fbe3e6", "#cfe3d4"
Points = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]


def reads(trace: Sequence[TraceEvent], layer: int, head: int) -> Points:
    """Collect what one head retrieved.

    Parameters
    ----------
    trace : sequence of TraceEvent
        Events of one sequence (row 0 is used).
    layer, head : int
        Which head.

    Returns
    -------
    steps, positions : numpy.ndarray
        int64 `(n,)`: at which step (from 0) a token was retrieved, and its position.
    """
    steps, positions = [], []
    for step, event in enumerate(event for event in trace if event.layer == layer):
        found = event.positions[0, head]
        found = found[found >= 0].astype(np.int64)
        positions.append(found)
        steps.append(np.full(len(found), step, dtype=np.int64))
    return np.concatenate(steps), np.concatenate(positions)


def is_evidence(positions: npt.NDArray[np.int64], sample: Sample) -> npt.NDArray[np.bool_]:
    """Which positions lie in the sample's needles, bool `(n,)`."""
    inside = np.zeros(len(positions), dtype=bool)
    for start, stop in sample.evidence:
        inside |= (positions >= start) & (positions < stop)
    return inside


def draw_pages(trace: Sequence[TraceEvent], sample: Sample, path: Path) -> None:
    """Draw a panel per layer and KV head: a dot for every retrieved token, red where it belongs to the needle.

    Parameters
    ----------
    trace : sequence of TraceEvent
        What the arm `TRACED` read for `sample`.
    sample : Sample
        Its evidence is marked.
    path : Path
        Where to write the PNG.

    Raises
    ------
    ValueError
        If the trace is empty: the arm read no pages.
    """
    if not trace:
        msg = "the trace is empty: no page was read"
        raise ValueError(msg)
    layers = sorted({event.layer for event in trace})
    n_heads = trace[0].positions.shape[1]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 1.2 + 1.75 * len(layers)), dpi=160, layout="constrained")
        grid = figure.subplots(len(layers), n_heads, sharex=True, sharey=True, squeeze=False)
        for row, layer in enumerate(layers):
            for head in range(n_heads):
                draw_head(grid[row, head], trace, layer, head, sample)
            grid[row, 0].set_ylabel("step")
        for axis in grid[-1]:
            axis.set_xlabel("position in the context")
        figure.suptitle(f"{sample.task}: what each KV head read from its pages ({TRACED.label})", size=12)
        figure.legend(
            handles=legend_handles(), loc="outside lower center", ncols=5, fontsize=9, columnspacing=1.4, frameon=False
        )
        figure.savefig(path)


def draw_head(axis: Axes, trace: Sequence[TraceEvent], layer: int, head: int, sample: Sample) -> None:
    """Draw one panel."""
    own = [event for event in trace if event.layer == layer]
    for start, stop in sample.evidence:
        axis.axvspan(start, stop, color=NEEDLE, linewidth=3, zorder=0)
    n_steps = np.arange(len(own))
    axis.fill_betweenx(n_steps, 0, [e.sink_tokens[0] for e in own], color=NEAR, linewidth=2, zorder=0)
    window, newest = [e.window_start[0] for e in own], [e.lengths[0] for e in own]
    axis.fill_betweenx(n_steps, window, newest, color=NEAR, linewidth=2, zorder=0)
    steps, positions = reads(trace, layer, head)
    hit = is_evidence(positions, sample)
    axis.scatter(positions[~hit], steps[~hit], s=2.0, c=COLOURS["icecache"], alpha=0.45, linewidths=0, rasterized=True)
    axis.scatter(positions[hit], steps[hit], s=9.0, c=HIT, linewidths=0, zorder=3, rasterized=True)
    n_question = len(sample.question)
    axis.axhline(n_question - 0.5, color=FAINT, linewidth=0.8, linestyle=(0, (4, 3)))
    axis.set_title(f"layer {layer}, KV head {head}   ({hit.sum()} of {len(hit)} in the needles)", size=9, loc="left")
    axis.set_xlim(-0.01 * newest[-1], 1.01 * newest[-1])
    axis.set_ylim(len(own) - 0.5, -0.5)


def legend_handles() -> list[Line2D | Patch]:
    """Build the entries of the legend."""
    return [
        Line2D([], [], color=HIT, linestyle="", marker="o", markersize=4, label="retrieved, in a needle"),
        Line2D([], [], color=COLOURS["icecache"], linestyle="", marker="o", markersize=3, label="retrieved, elsewhere"),
        Patch(color=NEEDLE, label="a needle of this question"),
        Patch(color=NEAR, label="sink and window (always read)"),
        Line2D([], [], color=FAINT, linestyle="--", label="question above, answer below"),
    ]
