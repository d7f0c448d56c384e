"""The module for ann-benchmarks, under a base class and an expansion of the configuration as its runner has them."""

from __future__ import annotations

import importlib
import itertools
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from icecache import brute_force

FOLDER = Path(__file__).parents[3] / "benches" / "ann-benchmarks" / "icecache"
BASE = """
class BaseANN:
    def done(self): pass
    def fit(self, X): pass
    def query(self, q, n): return []
    def batch_query(self, X, n): raise NotImplementedError
    def get_batch_results(self): return self.res
    def get_additional(self): return {}
    def __str__(self): return self.name
"""


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch):
    """A folder laid out like the benchmark's, with ours copied in as its README says."""
    algorithms = tmp_path / "ann_benchmarks" / "algorithms"
    (algorithms / "base").mkdir(parents=True)
    (algorithms / "base" / "module.py").write_text(BASE)
    shutil.copytree(FOLDER, algorithms / "icecache")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "ann_benchmarks"]:
        del sys.modules[name]


def definitions(metric: str) -> list[tuple[dict[str, str], list[object], list[list[object]]]]:
    """Entry, constructor arguments and query arguments of every run, as the runner expands them."""
    out = []
    for entry in yaml.safe_load((FOLDER / "config.yml").read_text())["float"]["any"]:
        for group in entry["run_groups"].values():
            arguments = [
                [
                    dict(zip(g, values, strict=True))
                    for values in itertools.product(*([v] if not isinstance(v, list) else v for v in g.values()))
                ]
                for g in group["arg_groups"]
            ]
            asked = [list(values) for values in itertools.product(*group["query_args"])]
            for chosen in itertools.product(*arguments):
                base = [metric if argument == "@metric" else argument for argument in entry["base_args"]]
                out.append((entry, [*base, *chosen], asked))
    return out


@pytest.mark.parametrize(("metric", "ours"), [("euclidean", "l2"), ("angular", "cosine")])
def test_every_run_of_the_configuration_answers_well(checkout, metric: str, ours: str):
    rng = np.random.default_rng(0)
    rows, queries = rng.standard_normal((400, 16), np.float32), rng.standard_normal((5, 16), np.float32)
    truth = brute_force(queries, rows, 10, ours).ids
    runs = definitions(metric)
    assert {arguments[1]["dtype"] for _, arguments, _ in runs} == {"float32", "bfloat16"}
    for entry, arguments, asked in runs:
        assert {"docker_tag", "module", "constructor", "name"} <= set(entry)
        algorithm = getattr(importlib.import_module(f"{entry['module']}.module"), entry["constructor"])(*arguments)
        algorithm.fit(rows)
        names = set()
        for setting in asked:
            algorithm.set_query_arguments(*setting)
            names.add(str(algorithm))
        assert len(names) == len(asked)  # results are filed under the name
        one = np.array([algorithm.query(query, 10) for query in queries])
        algorithm.batch_query(queries, 10)
        assert np.array_equal(one, np.array(algorithm.get_batch_results()))
        assert (np.sort(one) == np.sort(truth)).mean() > 0.9
        assert all(len(set(ids)) == 10 for ids in one.tolist())  # duplicates fail the benchmark
        assert algorithm.get_additional()["index_bytes"] > 0
        algorithm.done()


def test_a_metric_without_a_counterpart_is_refused(checkout):
    module = importlib.import_module("ann_benchmarks.algorithms.icecache.module")
    with pytest.raises(ValueError, match="metric: expected one of"):
        module.IceCache("hamming", {"dtype": "float32"})


def test_the_image_builds_on_the_benchmarks_own():
    lines = (FOLDER / "Dockerfile").read_text().splitlines()
    assert lines[0] == "FROM ann-benchmarks"
    assert any("pip3 install" in line and "icecache" in line for line in lines)
