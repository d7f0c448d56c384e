"""Attention mass that a budget of pages captures on attention-like keys, and what pruning the page scan costs.

    python benches/python/bench_mass.py                       # 36,864 keys, 3 seeds, the table
    python benches/python/bench_mass.py curve --tokens 307200 # mass lost against page summaries visited

Mass = share of the true softmax weight that lies in the chosen tokens. Arms, all on the same keys and queries:
exact top tokens (same number of tokens), our pages with our search, our pages chosen by exact scores (page oracle),
and pages of 16 consecutive tokens chosen by the per-channel box bound (the rule of Quest).
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from icecache import _core
from icecache.bench.attention_keys import Floats, attention_keys
from numpy.typing import NDArray

PAGE = 16
RESULTS = Path(__file__).parents[1] / "results"


def softmax(queries: Floats, keys: Floats) -> NDArray[np.float64]:
    """Compute the true attention weights ``(n_queries, n_tokens)``."""
    logits = (queries @ keys.T).astype(np.float64) / math.sqrt(keys.shape[1])
    weight = np.exp(logits - logits.max(1, keepdims=True))
    return weight / weight.sum(1, keepdims=True)


def build(keys: Floats, pool: _core.Pool) -> tuple[_core.Forest, float]:
    """One tree over all keys; returns it with the seconds its build took."""
    store = _core.PageStore(keys.shape[1], 0, "float32")
    forest = _core.Forest(store, 1)
    raw = keys.view(np.uint8)[None]
    start = time.perf_counter()
    _core.extend(pool, [forest], [raw], [raw[:, :, :0].copy()])
    return forest, time.perf_counter() - start


def chosen_tokens(selection: _core.Selection) -> NDArray[np.int64]:
    """Token numbers of a selection of one head, ``(tokens,)``."""
    positions = np.asarray(selection.positions())
    return positions[positions >= 0].astype(np.int64)


def box_bound(query: Floats, low: Floats, high: Floats) -> NDArray[np.float64]:
    """Upper bound of ``q . k`` over each positional page."""
    return np.maximum(query * low, query * high).sum(1)


def measure(
    kind: str, n: int, k_pages: list[int], seed: int, n_queries: int, pool: _core.Pool
) -> list[dict[str, object]]:
    """Mass of every arm for single query heads and for groups of four."""
    keys, queries = attention_keys(kind, n, n_queries=n_queries, seed=seed)  # type: ignore[arg-type]
    forest, build_s = build(keys, pool)
    blocks = keys[: n // PAGE * PAGE].reshape(-1, PAGE, keys.shape[1])
    low, high = blocks.min(1), blocks.max(1)
    scaling = keys.shape[1] ** -0.5
    rows: list[dict[str, object]] = []
    for k in k_pages:
        mass: dict[str, list[float]] = {}
        seconds = 0.0
        for step in queries:
            weight = softmax(step, keys)  # [group, n]
            top = np.sort(weight, 1)[:, -k * PAGE :].sum(1)
            start = time.perf_counter()
            one = _core.search(pool, [forest], step[None, None, :1].copy(), k, scaling=scaling)
            seconds += time.perf_counter() - start
            oracle = _core.search(pool, [forest], step[None, None, :1].copy(), k, scaling=scaling, exact=True)
            group = _core.search(pool, [forest], step[None, None].copy(), k, scaling=scaling)
            boxes = np.argsort(-box_bound(step[0], low, high), kind="stable")[:k]
            positional = (boxes[:, None] * PAGE + np.arange(PAGE)).ravel()
            union = np.argsort(-weight.sum(0), kind="stable")[: k * PAGE]
            for name, value in (
                ("top tokens", float(top[0])),
                ("icecache", float(weight[0, chosen_tokens(one)].sum())),
                ("page oracle", float(weight[0, chosen_tokens(oracle)].sum())),
                ("positional, box", float(weight[0, positional].sum())),
                ("group: top tokens", float(weight[:, union].sum(1).mean())),
                ("group: icecache", float(weight[:, chosen_tokens(group)].sum(1).mean())),
            ):
                mass.setdefault(name, []).append(value)
        shared = {
            "kind": kind,
            "n": n,
            "pages": k,
            "seed": seed,
            "build_s": build_s,
            "search_us": 1e6 * seconds / len(queries),
        }
        rows += [{**shared, "arm": name, "mass": float(np.mean(values))} for name, values in mass.items()]
    return rows


def table(args: argparse.Namespace, pool: _core.Pool) -> list[dict[str, object]]:
    """Print mass by arm and number of pages, averaged over the seeds."""
    rows = []
    for kind in args.kinds:
        for seed in range(args.seeds):
            rows += measure(kind, args.tokens, args.pages, seed, args.queries, pool)
        print(f"\n{kind}, {args.tokens} keys, d 128, {args.seeds} seeds x {args.queries} queries; mass by pages read")
        print(f"{'arm':20}" + "".join(f"{k:>8}" for k in args.pages))
        for arm in dict.fromkeys(str(r["arm"]) for r in rows):
            means = [
                np.mean([float(r["mass"]) for r in rows if r["arm"] == arm and r["pages"] == k and r["kind"] == kind])  # type: ignore[arg-type]
                for k in args.pages
            ]
            print(f"{arm:20}" + "".join(f"{m:8.3f}" for m in means))
    return rows


def probe_cost(
    pool: _core.Pool, case: tuple[_core.Forest, Floats, list[NDArray[np.float64]]], k: int, probe: float | None
) -> tuple[float, float, float]:
    """Measure the mean mass of the pages found, the page summaries visited, and the microseconds of a search."""
    forest, queries, weights = case
    scaling = queries.shape[-1] ** -0.5
    masses, visited, times = [], [], []
    for step, weight in zip(queries, weights, strict=True):
        start = time.perf_counter()
        found = _core.search(pool, [forest], step[None, None].copy(), k, scaling=scaling, probe_mass=probe)
        times.append(time.perf_counter() - start)
        masses.append(weight[:, chosen_tokens(found)].sum(1).mean())
        visited.append(int(np.asarray(found.visited).sum()))
    return float(np.mean(masses)), float(np.mean(visited)), 1e6 * float(np.median(times))


def curve(args: argparse.Namespace, pool: _core.Pool) -> list[dict[str, object]]:
    """Print mass lost against the flat scan, by share of the page summaries visited."""
    rows: list[dict[str, object]] = []
    for kind in args.kinds:
        keys, queries = attention_keys(kind, args.tokens, n_queries=args.queries, seed=0)
        forest, _ = build(keys, pool)
        case = forest, queries, [softmax(step, keys) for step in queries]
        flat, all_pages, flat_us = probe_cost(pool, case, args.pages[-1], 1.0)
        print(f"\n{kind}, {args.tokens} keys, {args.pages[-1]} pages read, group of 4")
        print(f"flat scan: mass {flat:.3f}, {flat_us:.0f} us")
        print(f"{'probe':>8}{'visited':>9}{'mass lost':>11}{'time':>7}")
        for probe in (0.5, 0.7, 0.8, 0.9, 0.95, 0.99, None):
            mass, visited, us = probe_cost(pool, case, args.pages[-1], probe)
            name = "default" if probe is None else f"{probe:.2f}"
            print(f"{name:>8}{visited / all_pages:9.2f}{flat - mass:11.4f}{us / flat_us:7.2f}")
            cost = {"visited": visited / all_pages, "lost": flat - mass, "us": us, "flat_us": flat_us}
            rows.append({"kind": kind, "n": args.tokens, "probe": name, **cost})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["table", "curve"], default="table")
    parser.add_argument("--tokens", type=int, default=36864)
    parser.add_argument("--pages", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--kinds", nargs="+", default=["llama", "qwen"])
    parser.add_argument("--queries", type=int, default=96)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="write a JSON line here")
    args = parser.parse_args()
    run: Callable[[argparse.Namespace, _core.Pool], list[dict[str, object]]] = table if args.what == "table" else curve
    rows = run(args, _core.Pool(args.threads))
    sha = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    record = {"bench": "mass", "what": args.what, "git": sha, "machine": platform.processor() or platform.machine(),
              "simd": _core.simd(), "threads": args.threads, "queries": args.queries, "rows": rows}  # fmt: skip
    if args.out:
        args.out.write_text(json.dumps(record) + "\n", encoding="utf-8")
    print(json.dumps({k: v for k, v in record.items() if k != "rows"}))


if __name__ == "__main__":
    main()
