"""Figure of the speed table: milliseconds a token over the context, a line per method and budget."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path


def plot(lines: Sequence[dict[str, object]], path: Path) -> None:
    """Draw the saved cells into a PNG file."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    series: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for line in lines:
        cell = line["cell"]
        assert isinstance(cell, dict)
        name = str(cell["method"]) + (f" {cell['budget']}" if cell["budget"] else "")
        name += f", batch {cell['batch']}" if cell["batch"] != 1 else ""
        series[name].append((float(cell["context"]), float(str(line["tpot_ms_p50"]))))
    figure, axes = plt.subplots(figsize=(7, 4.5))
    for name, points in series.items():
        xs, ys = zip(*sorted(points), strict=True)
        axes.plot(xs, ys, marker="o", label=name)
    axes.set(xlabel="tokens in the context", ylabel="ms per token (median)", xscale="log", yscale="log")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
