"""Figure: exact match against budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import matplotlib as mpl
from matplotlib.figure import Figure

from icecache.demo.arms import LABELS, Kind, Measurement
from icecache.demo.options import BUDGETS
from icecache.demo.table import score

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, FAINT = "#22303c", "#9aa7b2"
COLOURS: Final[dict[Kind, str]] = {"full": INK, "icecache": "#0b84d8", "streaming": "#e2711d"}
MARKERS: Final[dict[Kind, str]] = {"icecache": "o", "streaming": "s"}
STYLE: Final = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def draw_accuracy(measurements: Sequence[Measurement], tasks: Sequence[str], path: Path) -> None:
    """Draw one panel for all tasks together and one a task.

    Parameters
    ----------
    measurements : sequence of Measurement
        Every arm on every sample.
    tasks : sequence of str
        Tasks to draw.
    path : Path
        Where to write the PNG.
    """
    panels: list[str | None] = [None, *tasks] if len(tasks) > 1 else list(tasks)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(1.6 + 2.3 * len(panels), 3.6), dpi=160, layout="constrained")
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, task in zip(axes, panels, strict=True):
            draw_panel(axis, measurements, task)
        axes[0].set_ylabel("exact match")
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
        sample = measurements[0].outcome.sample
        figure.suptitle(f"{len(sample.prompt + sample.answer)} tokens of context: who still finds the needle?", size=12)
        figure.savefig(path)


def draw_panel(axis: Axes, measurements: Sequence[Measurement], task: str | None) -> None:
    """Draw the lines of one task, or of all together."""
    chosen = [m for m in measurements if task in {None, m.outcome.sample.task}]
    full = [m for m in chosen if m.arm.kind == "full"]
    axis.axhline(
        score(full), color=COLOURS["full"], linestyle=(0, (4, 3)), linewidth=1.4, zorder=4, label=LABELS["full"]
    )
    for kind, marker in MARKERS.items():
        scores = [score([m for m in chosen if m.arm.kind == kind and m.arm.budget == budget]) for budget in BUDGETS]
        axis.plot(
            range(len(BUDGETS)),
            scores,
            color=COLOURS[kind],
            marker=marker,
            markersize=7,
            linewidth=2,
            clip_on=False,
            zorder=3,
            label=LABELS[kind],
        )
    axis.set_xticks(range(len(BUDGETS)), [str(budget) for budget in BUDGETS])
    axis.set_xlim(-0.25, len(BUDGETS) - 0.75)
    axis.set_ylim(-0.03, 1.05)
    axis.set_yticks([0, 0.25, 0.5, 0.75, 1.0])
    axis.grid(axis="y", color="#e6eaed", linewidth=0.8)
    axis.set_axisbelow(True)
    axis.set_xlabel("tokens per KV head")
    axis.set_title(f"{task or 'all tasks'}  (n = {len(full)})", size=10)
