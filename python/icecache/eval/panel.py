"""Figure of an attention report: mass and error by layer, and where page policies lose mass."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import matplotlib as mpl
from matplotlib.figure import Figure

from icecache.errors import DataError
from icecache.eval.figures import FAINT, OURS, STYLE, WIDTH, Drawing, looks_of, to_svg
from icecache.eval.heads import HeadRow, known_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FILE: Final = "attention.json"


def read_rows(path: Path) -> list[HeadRow]:
    """Read the heads of an `attention.json`.

    Raises
    ------
    DataError
        If it is none.
    """
    try:
        return [HeadRow(**row) for row in json.loads(path.read_text(encoding="utf-8"))["heads"]]
    except (ValueError, TypeError, KeyError, OSError) as error:
        msg = f"{path} is not what icecache eval attention writes: {error!r}"
        raise DataError(msg) from error


def draw_attention(rows: Sequence[HeadRow]) -> Iterator[Drawing]:
    """Draw a panel for each budget.

    Parameters
    ----------
    rows : sequence of HeadRow
        Of one report.
    """
    budgets = sorted({int(row.arm.partition("@")[2] or 0) for row in rows})
    for budget in budgets:
        with mpl.rc_context(STYLE):
            yield _panel([row for row in rows if row.arm.partition("@")[2] == str(budget)], budget)


def _panel(rows: Sequence[HeadRow], budget: int) -> Drawing:
    policies = [arm.partition("@")[0] for arm in dict.fromkeys(row.arm for row in rows)]
    figure = Figure(figsize=(WIDTH, 6.0), layout="constrained")
    grid = figure.add_gridspec(2, 2)
    for place, name in enumerate(("mass", "error")):
        axis = figure.add_subplot(grid[0, place])
        for policy in policies:
            _by_layer(axis, [row for row in rows if row.arm == f"{policy}@{budget}"], name, policy, policies)
        axis.set_title({"mass": "captured mass", "error": "relative output error"}[name], size=10)
        axis.set_xlabel("layer")
        axis.set_ylim(bottom=0)
        axis.grid(visible=True)
    _regrets(figure.add_subplot(grid[1, :]), rows, policies, budget)
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    return Drawing(
        f"Attention at {budget} tokens",
        "Lines: mean over KV heads; dots: KV heads. Below: mass that the best choice of as many tokens would hold "
        "more; for policies that choose whole pages of our index also its parts: packing (best tokens minus best "
        "pages, of a KV head) and search (best pages minus chosen ones).",
        to_svg(figure, f"attention-{budget}"),
    )


def _by_layer(axis: Axes, rows: Sequence[HeadRow], name: str, policy: str, policies: Sequence[str]) -> None:
    looks = looks_of(policy, policies)
    layers = sorted({row.layer for row in rows})
    means = [known_mean(row.means[name] for row in rows if row.layer == layer) for layer in layers]
    (line,) = axis.plot(layers, [math.nan if m is None else m for m in means], color=looks.colour, label=policy)
    line.set(linewidth=looks.width, marker=looks.marker, markersize=5, zorder=looks.order)
    heads = [(row.layer, value) for row in rows if (value := row.means[name]) is not None]
    axis.scatter([x for x, _ in heads], [y for _, y in heads], color=looks.colour, s=9, alpha=0.45, linewidths=0)


def _regrets(axis: Axes, rows: Sequence[HeadRow], policies: Sequence[str], budget: int) -> None:
    kinds = {"regret": FAINT, "packing": "#e2711d", "search": OURS}
    for shift, (kind, colour) in enumerate(kinds.items()):
        values = [known_mean(r.means[kind] for r in rows if r.arm == f"{policy}@{budget}") for policy in policies]
        places = [i + 0.27 * (shift - 1) for i, value in enumerate(values) if value is not None]
        axis.barh(places, [v for v in values if v is not None], height=0.25, color=colour, label=kind)
    axis.set_yticks(range(len(policies)), policies)
    axis.set_ylim(len(policies) - 0.45, -0.55)  # the first on top, and room between a name and the numbers below
    axis.set_title("mass missed", size=10)
    axis.legend(frameon=False, fontsize=9)
