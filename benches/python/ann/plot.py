"""Recall against queries per second, one panel per data set and k."""

from __future__ import annotations

from pathlib import Path

from ann.summary import Row
from ann.verdicts import OURS

_LEAST = 0.5  # recall below which nobody wants to be
_DEPTHS = (10, 100)


def front(row: Row, k: int) -> list[tuple[float, float]]:
    """Give the settings that no other setting of the peer beats in recall and speed, by rising recall."""
    points = sorted(((p["recall"], 1e6 / p["batch_us"]) for p in row.points if p["k"] == k), reverse=True)
    out: list[tuple[float, float]] = []
    for recall, speed in points:
        if not out or speed > out[-1][1]:
            out.append((recall, speed))
    return out[::-1]


def draw(rows: list[Row], file: Path) -> None:
    """Write the figure; the format follows from the suffix."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams["svg.fonttype"] = "none"
    mpl.rcParams["svg.hashsalt"] = "icecache"
    from matplotlib import pyplot as plt

    data = list(dict.fromkeys(row.data for row in rows))
    figure, axes = plt.subplots(len(data), len(_DEPTHS), figsize=(13, 4.2 * len(data)), squeeze=False)
    peers = sorted({row.peer for row in rows if row.peer != OURS})
    colours = {peer: plt.get_cmap("tab20")(number % 20) for number, peer in enumerate(peers)}
    for name, line in zip(data, axes, strict=True):
        for k, panel in zip(_DEPTHS, line, strict=True):
            for row in rows:
                points = [point for point in front(row, k) if point[0] >= _LEAST] if row.data == name else []
                if not points:
                    continue
                ours = row.peer == OURS
                style = {"color": "black", "linewidth": 2.5, "zorder": 5} if ours else {"color": colours[row.peer]}
                panel.plot(*zip(*points, strict=True), marker="o", markersize=3, label=row.peer, **style)
            panel.set(title=f"{name}, recall@{k}", xlabel="recall", ylabel="queries/s, one thread", yscale="log")
            panel.set_xlim(_LEAST, 1.005)
            panel.axvline(0.95, color="grey", linewidth=0.5)
            panel.grid(alpha=0.3)
        line[-1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.tight_layout()
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None)
    plt.close(figure)
