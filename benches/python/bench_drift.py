"""Attention mass of 16 pages by the share of the keys that was inserted, not built in bulk: table, JSON, plot.

    python benches/python/bench_drift.py                  # 36,864 keys; the crate's own generator, llama and qwen

The measuring is done by ``benches/rust/drift.rs``; the keys of ``icecache.bench.attention_keys`` go to it as files.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import TypedDict

import matplotlib as mpl
from icecache.bench.attention_keys import attention_keys
from matplotlib.figure import Figure

ROOT = Path(__file__).parents[2]
QUERIES = 64
COLOURS = {"segments": "#0b84d8", "background": "#7a5cc8", "tiers": "#2a9d5c", "never": "#e2711d"}
# The sealed ones nearly coincide.
DASHES = {"segments": "-", "background": "--", "tiers": ":", "never": "-"}
LABELS = {
    "segments": "sealed every 1024 tokens, at once",
    "background": "every 1024, aside",
    "tiers": "every 256, then 1024, aside",
    "never": "never: pages split",
}
TITLES = {"llama": "llama-like", "qwen": "qwen-like"}


class Row(TypedDict):
    """A line that ``drift.rs`` prints; these are the fields used here."""

    data: str
    n: int
    sealing: str
    share: float
    mass: float
    error: float
    mass_group: float


def measure(n: int, kinds: list[str], folder: Path) -> list[Row]:
    """Run the Rust program over its own keys and over files of ours; one row per data set, sealing and share."""
    names = [str(n)]
    for kind in kinds:
        keys, queries = attention_keys(kind, n, n_queries=QUERIES, seed=0)  # type: ignore[arg-type]
        keys.tofile(folder / f"{kind}.k")
        queries.tofile(folder / f"{kind}.q")
        names.append(str(folder / kind))
    command = [
        "cargo",
        "run",
        "-q",
        "--release",
        "-p",
        "icecache-core",
        "--features",
        "bench",
        "--example",
        "drift",
        "--",
    ]
    out = subprocess.run([*command, *names], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [json.loads(line) for line in out.splitlines()]


def show(rows: list[Row]) -> None:
    """Print one block per data set: the mass of one query head (of a group of four) by inserted share."""
    for data in dict.fromkeys(row["data"] for row in rows):
        mine = [row for row in rows if row["data"] == data]
        shares = sorted({row["share"] for row in mine})
        print(f"\n{data}: {mine[0]['n']} keys, 16 pages, one query head (group of 4); s.e. {mine[0]['error']:.3f}")
        print(f"{'inserted':<12}" + "".join(f"{share:>14.1%}" for share in shares))
        for sealing in dict.fromkeys(row["sealing"] for row in mine):
            cells = {
                row["share"]: f"{row['mass']:.3f} ({row['mass_group']:.3f})"
                for row in mine
                if row["sealing"] == sealing
            }
            print(f"{sealing:<12}" + "".join(f"{cells[share]:>14}" for share in shares))


def draw(rows: list[Row], path: Path) -> None:
    """Draw one panel per data set."""
    names = list(dict.fromkeys(row["data"] for row in rows))
    with mpl.rc_context(
        {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "icecache"}
    ):
        figure = Figure(figsize=(2.9 * len(names), 2.9), layout="constrained")
        axes = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
        for axis, name in zip(axes, names, strict=True):
            for sealing in dict.fromkeys(row["sealing"] for row in rows):
                line = [row for row in rows if row["data"] == name and row["sealing"] == sealing]
                points = [100 * row["share"] for row in line], [row["mass"] for row in line]
                axis.plot(*points, DASHES[sealing], marker="o", ms=3, color=COLOURS[sealing], label=LABELS[sealing])
            axis.set_title(TITLES.get(name, name), size=9)
            axis.set_xlabel("keys inserted, %")
        axes[0].set_ylabel("softmax mass in 16 pages")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=36864)
    parser.add_argument("--kinds", nargs="*", default=["llama", "qwen"])
    parser.add_argument("--rows", type=Path, help="draw these JSON lines instead of measuring")
    parser.add_argument("--json", type=Path, help="write the rows here, a JSON line each")
    parser.add_argument("--plot", type=Path, help="write the plot here (SVG or PNG)")
    args = parser.parse_args()
    if args.rows:
        rows = [json.loads(line) for line in args.rows.read_text(encoding="utf-8").splitlines()]
    else:
        with tempfile.TemporaryDirectory() as folder:
            rows = measure(args.tokens, args.kinds, Path(folder))
    show(rows)
    if args.json:
        args.json.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    if args.plot:
        draw(rows, args.plot)


if __name__ == "__main__":
    main()
