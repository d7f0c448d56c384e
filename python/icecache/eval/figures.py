"""Figures of a report as inline SVG: budget curve, length curve, heat maps, costs. Each only where its data exist."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from icecache.eval import curves
from icecache.eval.record import Setup
from icecache.eval.results import Cell, Results, budget_of
from icecache.eval.stats import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# A colour that nothing else has: it becomes the page's text colour, light or dark.
INK: Final = "#010203"
FAINT: Final = "#8794a0"
OURS: Final = "#0b84d8"
COLOURS: Final = ("#e2711d", "#2a9d5c", "#a05ad6", "#d6336c", "#b08900", "#12a5a5", "#8c6d5a", "#7a869a", "#5c7cfa")
MARKERS: Final = "osD^vPX<>*"
STYLE: Final = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": FAINT,
    "grid.alpha": 0.25,
    "svg.fonttype": "none",
    "svg.hashsalt": "icecache",
}
HEAT_POLICIES: Final = ("icecache", "streaming")
# Policies that our runtime really runs with pages; the time of the others is that of a mask over dense logits.
COSTED: Final = ("full", "icecache", "icecache-reuse", "streaming")
MOST_PANELS: Final = 24
WIDTH: Final = 5.6
"""Of most figures, in inches: on a phone of 390 pixels text of 10 points is 9 pixels high and nothing scrolls."""


@dataclass(frozen=True, slots=True)
class Drawing:
    """A figure of the page.

    Parameters
    ----------
    title, caption : str
        Plain text.
    svg : str
        An `<svg>` element without any reference outside itself.
    """

    title: str
    caption: str
    svg: str


def draw(results: Results, budget: int | None = None) -> Iterator[Drawing]:
    """Draw what the records allow.

    Parameters
    ----------
    results : Results
        The run.
    budget : int or None, default=None
        Of length curves, heat maps and costs; None: the smallest.
    """
    budget = budget if budget is not None else min(results.budgets, default=None)
    with mpl.rc_context(STYLE):
        for setup, length in results.groups:
            yield from _budget_curve(results, (setup, length))
        for setup in dict.fromkeys(setup for setup, _ in results.groups):
            yield from _length_curve(results, setup, budget)
            yield from _generated_curve(results, setup, budget)
            for task in curves.deep_tasks(results, setup):
                yield from _heat_maps(results, setup, task, budget)
        for setup, length in results.groups:
            yield from _costs(results, (setup, length), budget)


def _name(setup: Setup, length: int) -> str:
    return f"setup {setup}, {length:,} tokens" if length else f"setup {setup}"


def _left_out(arms: Sequence[str]) -> str:
    return f" Left out, because they did not run on all of these: {', '.join(arms)}." if arms else ""


@dataclass(frozen=True, slots=True)
class Looks:
    """How a policy's line looks.

    Parameters
    ----------
    colour, marker : str
        As matplotlib takes them.
    width : float
        In points.
    order : int
        What is higher lies on top.
    """

    colour: str
    marker: str
    width: float
    order: int


def looks_of(policy: str, policies: Sequence[str]) -> Looks:
    """Say how a policy's line looks; the same in every figure of a page."""
    if policy == "icecache":
        return Looks(OURS, "o", 2.6, 5)
    place = [p for p in policies if p != "icecache"].index(policy)
    # Colours and marks repeat at different places: 90 looks.
    return Looks(COLOURS[place % len(COLOURS)], MARKERS[(place + 1) % len(MARKERS)], 1.3, 3)


def _plot(axis: Axes, xs: Sequence[float], means: Sequence[Interval], label: str, looks: Looks, band: bool) -> None:
    """Draw one line, with the band of its intervals (a bar where it has one point)."""
    scores = [100 * mean.estimate for mean in means]
    (line,) = axis.plot(xs, scores, label=label, color=looks.colour, marker=looks.marker, markersize=5)
    line.set(linewidth=looks.width, zorder=looks.order)
    low, high = [100 * max(0.0, m.low) for m in means], [100 * min(1.0, m.high) for m in means]
    if band and len(means) > 1:
        axis.fill_between(xs, low, high, color=looks.colour, alpha=0.12, linewidth=0)
    elif band:
        axis.vlines(xs, low, high, color=looks.colour, alpha=0.5)


def _budget_curve(results: Results, group: curves.Group) -> Iterator[Drawing]:
    """Score against loaded tokens, a line a policy; the macro average and every task."""
    chosen = curves.shared(results, [group], [arm for arm in results.arms if budget_of(arm) is not None])
    if chosen is None:
        return
    policies = list(curves.by_policy(results.arms))
    panels: list[tuple[str, tuple[str, ...]]] = [("macro", chosen.tasks)]
    if 1 < len(chosen.tasks) <= MOST_PANELS:
        panels += [(task, (task,)) for task in chosen.tasks]
    columns = min(3, len(panels))
    rows = math.ceil((len(panels) - 1) / 3) if len(panels) > 1 else 0
    figure = Figure(figsize=(WIDTH, 4.2 + 1.8 * rows), layout="constrained")
    grid = figure.add_gridspec(1 + rows, columns, height_ratios=[2.0, *[1.0] * rows])
    for place, (title, tasks) in enumerate(panels):
        spot = grid[0, :] if place == 0 else grid[1 + (place - 1) // 3, (place - 1) % 3]
        axis = figure.add_subplot(spot)
        full = curves.macro(results, group, tasks, "full")
        axis.axhline(100 * full.estimate, color=INK, linestyle=(0, (4, 3)), linewidth=1.2, label="full")
        for policy, arms in curves.by_policy(chosen.arms).items():
            xs = [curves.loaded(results, group, tasks, arm) or math.nan for arm in arms]
            means = [curves.macro(results, group, tasks, arm) for arm in arms]
            _plot(axis, xs, means, policy, looks_of(policy, policies), band=place == 0)
        _loaded_axis(axis, results, group, chosen)
        axis.set_title(f"{title} (n = {sum(len(results.records(Cell(*group, t), 'full')) for t in tasks)})", size=10)
    top = figure.axes[0]
    top.set_xlabel("tokens loaded per KV head and step")
    top.set_ylabel("score, points")
    figure.legend(*top.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    yield Drawing(
        f"Score against loaded tokens: {_name(*group)}",
        f"Macro average over {', '.join(chosen.tasks)}, and each of them. Loaded: the union over the query heads of a "
        "KV head, what has to be moved; not the nominal budget. Bands: 95 % intervals of the mean over samples (an arm "
        "beside full is compared in the tables, pair by pair). Dashed: full attention." + _left_out(chosen.left_out),
        to_svg(figure, f"budget-{group[0]}-{group[1]}"),
    )


def _loaded_axis(axis: Axes, results: Results, group: curves.Group, chosen: curves.Shared) -> None:
    found = [curves.loaded(results, group, chosen.tasks, arm) for arm in chosen.arms if budget_of(arm) is not None]
    numbers = [value for value in found if value]
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    if numbers:
        axis.set_xlim(0.85 * min(numbers), 1.18 * max(numbers))
    axis.set_ylim(-3, 103)
    axis.grid(visible=True)


def _arm_curves(
    results: Results, xs: Sequence[float], scores: Mapping[str, Sequence[Interval]], label: str, *, bands: bool
) -> tuple[Figure, Axes]:
    """Draw the scores of arms over `xs`, full attention dashed; without `bands` only ours has its interval."""
    policies = list(curves.by_policy(results.arms))
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    axis = figure.add_subplot()
    for arm, means in scores.items():
        if arm == "full":
            points = [100 * mean.estimate for mean in means]
            axis.plot(xs, points, color=INK, linestyle=(0, (4, 3)), linewidth=1.2, label="full")
            continue
        looks = looks_of(arm.partition("@")[0], policies)
        _plot(axis, xs, means, arm, looks, band=bands or looks.colour == OURS)  # all would hide the lines
    axis.set_ylim(-3, 103)
    axis.grid(visible=True)
    axis.set_xlabel(label)
    axis.set_ylabel("score, points")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return figure, axis


def _length_curve(results: Results, setup: Setup, budget: int | None) -> Iterator[Drawing]:
    """Score against the context's length at one budget."""
    groups = [(s, length) for s, length in results.groups if s == setup and length]
    if len(groups) < 2:
        return
    chosen = curves.shared(results, groups, [arm for arm in results.arms if budget_of(arm) == budget])
    if chosen is None:
        return
    lengths = [length for _, length in groups]
    scores = {arm: [curves.macro(results, group, chosen.tasks, arm) for group in groups] for arm in chosen.arms}
    figure, axis = _arm_curves(results, lengths, scores, "tokens of context", bands=True)
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [f"{length:,}" for length in lengths])
    axis.xaxis.set_minor_formatter(NullFormatter())
    yield Drawing(
        f"Score against length: setup {setup}, budget {budget}",
        f"Macro average over {', '.join(chosen.tasks)}; bands: 95 % intervals." + _left_out(chosen.left_out),
        to_svg(figure, f"length-{setup}"),
    )


def _generated_curve(results: Results, setup: Setup, budget: int | None) -> Iterator[Drawing]:
    """Score against the tokens of the answer at one budget."""
    groups = [group for group in results.groups if group[0] == setup]
    found = curves.by_generated(results, groups, [arm for arm in results.arms if budget_of(arm) == budget])
    if found is None:
        return
    places = range(len(found.edges))
    figure, axis = _arm_curves(results, places, found.scores, "generated tokens", bands=False)
    names = [f"{low}" if low == high else f"{low} to {high}" for low, high in found.edges]
    axis.set_xticks(places, [f"{name}\n(n = {n})" for name, n in zip(names, found.counts, strict=True)])
    yield Drawing(
        f"Score against generated tokens: setup {setup}, budget {budget}",
        f"All samples of {', '.join(found.tasks)}, by how long full attention's answer is; band: ours, 95 %. "
        "Long answers belong to other tasks than short ones: compare the arms at one length, not the lengths.",
        to_svg(figure, f"generated-{setup}"),
    )


def _heat_maps(results: Results, setup: Setup, task: str, budget: int | None) -> Iterator[Drawing]:
    """Length against depth: full attention, ours, and sink and window."""
    arms = ["full", *(f"{policy}@{budget}" for policy in HEAT_POLICIES)]
    maps = {arm: found for arm in arms if (found := curves.heat(results, setup, task, arm)) is not None}
    n_lengths = len(next(iter(maps.values())).lengths)
    figure = Figure(figsize=(1.0 + len(maps) * max(1.5, 0.45 * n_lengths), 3.6), layout="constrained")
    axes = figure.subplots(1, len(maps), sharey=True, squeeze=False)[0]
    for axis, (arm, found) in zip(axes, maps.items(), strict=True):
        axis.pcolormesh(found.scores, cmap="viridis", vmin=0, vmax=1, edgecolor="none")
        for row, column in ((r, c) for r in range(found.scores.shape[0]) for c in range(n_lengths)):
            value = float(found.scores[row, column])
            if not math.isnan(value):
                colour = "#ffffff" if value < 0.6 else "#111111"
                text = f"{100 * value:.0f}"
                axis.text(column + 0.5, row + 0.5, text, ha="center", va="center", size=8, color=colour)
        axis.set_xticks([i + 0.5 for i in range(n_lengths)], [f"{n / 1024:g}k" for n in found.lengths])
        axis.set_title(arm, size=10)
    axes[0].set_ylim(curves.DEPTH_BINS, 0)
    axes[0].set_yticks(range(0, curves.DEPTH_BINS + 1, 2), [f"{10 * i} %" for i in range(0, curves.DEPTH_BINS + 1, 2)])
    axes[0].set_ylabel("depth of the needle")
    yield Drawing(
        f"Length and depth: {task}, setup {setup}",
        "Mean score in points; 0 % is the beginning of the context. Empty: no sample lies there.",
        to_svg(figure, f"heat-{setup}-{task}"),
    )


def _costs(results: Results, group: curves.Group, budget: int | None) -> Iterator[Drawing]:
    """Time to the first token, time a token and bytes fetched, of what our runtime runs as it is meant to."""
    wanted = ["full", *(f"{policy}@{budget}" for policy in COSTED[1:])]
    here = results.of_group(*group)
    arms = [arm for arm in wanted if any(results.records(cell, arm) for cell in here)]
    # The same questions for all: answers differ in length by task.
    cells = [cell for cell in here if all(results.records(cell, arm) for arm in arms)]
    columns: dict[str, Callable[[str], float | None]] = {
        "TTFT, s": lambda arm: results.mean(cells, arm, "ttft_s"),
        "TPOT, ms": lambda arm: _scaled(results.mean(cells, arm, "tpot_s"), 1e3),
        "fetched, MiB": lambda arm: _scaled(results.mean(cells, arm, "bytes"), 2.0**-20),
    }
    values = {name: [column(arm) for arm in arms] for name, column in columns.items()}
    arms = [arm for i, arm in enumerate(arms) if all(row[i] is not None for row in values.values())]
    if len(arms) < 2:
        return
    figure = Figure(figsize=(WIDTH, 1.2 + 0.34 * len(arms)), layout="constrained")
    axes = figure.subplots(1, len(columns), sharey=True)
    for axis, name in zip(axes, columns, strict=True):
        shown = [float(v) for v in values[name] if v is not None]
        colours = [OURS if arm.startswith("icecache") else FAINT for arm in arms]
        bars = axis.barh(range(len(arms)), shown, color=colours, height=0.65)
        axis.bar_label(bars, [f"{v:,.3g}" if v < 1000 else f"{v:,.0f}" for v in shown], padding=3, size=9)
        axis.set_title(name, size=10)
        axis.set_xlim(0, 1.35 * max(max(shown), 1e-9))
        axis.set_xticks([])
    axes[0].set_yticks(range(len(arms)), arms)
    axes[0].invert_yaxis()
    rows = sorted({r.stats.rows for cell in cells for arm in arms for r in results.records(cell, arm).values()})
    yield Drawing(
        f"Cost: {_name(*group)}",
        f"Means over whole batches ({', '.join(map(str, rows))} rows), on one machine: time to the first token with "
        "the prefill, time a token, bytes of pages that came to the device during an answer. Only full attention and "
        "what our runtime runs with pages: the other policies mask dense logits here, their time says nothing of them.",
        to_svg(figure, f"cost-{group[0]}-{group[1]}"),
    )


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def to_svg(figure: Figure, name: str) -> str:
    """Write a figure as an element of a page: no header, no references outside, ids that start with `name`."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href=", "href=")
    text = re.sub(r'^<svg[^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', text)
    prefix = re.sub(r"[^\w-]", "-", name) + "-"
    text = re.sub(r'\bid="', f'id="{prefix}', text)
    text = text.replace("url(#", f"url(#{prefix}").replace('href="#', f'href="#{prefix}')
    return text.replace(INK, "currentColor").strip()
