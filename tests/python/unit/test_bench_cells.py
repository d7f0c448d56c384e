"""Which cells `icecache bench` measures, and that a table is finished by several runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import icecache
import pytest
from icecache.bench.cells import SLOW_STEPS
from icecache.bench.parts import by_part
from icecache.bench.run import BenchOptions, run_bench, table
from icecache.errors import ConfigError

TINY = {"shape": "tiny", "device": "cpu", "steps": 3, "contexts": (1100,), "methods": ("ice-eager", "hf")}


def names(options):
    return [(c.method, c.context, c.batch, c.budget) for c in options.cells()]


def test_all_combinations_with_baselines_once():
    options = BenchOptions(contexts=(100, 200), batches=(1, 2), budgets=(64, 256), methods=("ice", "hf"))
    assert len(names(options)) == 2 * 2 * (2 + 1)
    assert names(options).count(("hf", 100, 1, 0)) == 1


def test_single_cells():
    options = BenchOptions(only=("ice@36k", "ice@64kx4:1024", "hf@100x2", "ice-6@7:64"))
    assert names(options) == [("ice", 36864, 1, 256), ("ice", 65536, 4, 1024), ("hf", 100, 2, 0), ("ice-6", 7, 1, 64)]


@pytest.mark.parametrize("text", ["ice", "ice@", "ice@0", "other@4k", "ice@4kx0", "ice@4k:x", "ice@4k,hf@4k", "@4k"])
def test_a_cell_that_means_nothing_is_an_error_that_shows_it(text):
    with pytest.raises(ConfigError, match="only must be"):
        BenchOptions(only=(text,))


def test_a_second_run_measures_what_the_first_one_left(tmp_path, capsys):
    run_bench(BenchOptions(**TINY, out=tmp_path, only=("hf@1100",)))
    path = tmp_path / "bench.jsonl"
    first = path.read_text()
    run_bench(BenchOptions(**TINY, out=tmp_path, stop_after_s=-1))
    assert path.read_text() == first, "no cell is begun after the time is over"
    run_bench(BenchOptions(**TINY, out=tmp_path))
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert path.read_text().startswith(first)
    assert [line["cell"]["method"] for line in lines] == ["hf", "ice-eager"]
    assert all(line["tpot_ms_p50"] > 0 and not line["error"] for line in lines)
    assert lines[1]["kv_host_bytes"] > 0 == lines[0]["kv_host_bytes"]
    assert "ice-eager" in capsys.readouterr().out


def test_cells_that_differ_in_budget_share_the_pages_of_the_first(tmp_path, monkeypatch):
    monkeypatch.setitem(SLOW_STEPS, "hf", 2)
    cells = ("ice-eager@1100:256", "hf@1100", "ice-eager@1100:1024", "ice-eager@1100:64", "ice-eager@1200:64")
    run_bench(BenchOptions(**TINY, out=tmp_path / "shared", only=cells))
    run_bench(BenchOptions(**TINY, out=tmp_path / "alone", only=cells[2:3]))
    lines, (alone,) = (
        [json.loads(line) for line in (tmp_path / name / "bench.jsonl").read_text().splitlines()]
        for name in ("shared", "alone")
    )
    assert [line["adopted"] for line in lines] == [False, False, True, True, False]
    assert [len(line["steps_ms"]) for line in lines] == [3, 2, 3, 3, 3]
    assert lines[2]["attended"] == alone["attended"]
    assert lines[3]["attended"] <= 64 + 16
    assert lines[2]["kv_host_bytes"] == alone["kv_host_bytes"]


def test_a_prompt_cell_gives_the_time_to_the_second_token(tmp_path):
    run_bench(BenchOptions(**{**TINY, "contexts": (1200,), "methods": ("ice-eager",), "prompt": True}, out=tmp_path))
    (line,) = [json.loads(line) for line in (tmp_path / "bench.jsonl").read_text().splitlines()]
    assert line["tt2t_s"] == pytest.approx(line["fill_s"] + line["first_ms"] / 1e3)
    assert line["attended"] > 0


def test_time_on_the_device_is_dealt_to_parts_and_gaps_are_idle():
    spans = [
        ("gemm", 0.0, 10.0),
        ("_mailbox_wait_kernel", 12.0, 30.0),
        ("_paged_decode_kernel_0d1d", 30.0, 35.0),
        ("gemm", 33.0, 40.0),  # overlaps: counted in its part, and no gap
        ("Memcpy DtoH", 45.0, 46.0),
    ]
    parts = by_part(reversed(spans))
    assert parts == {
        "model": 17.0,
        "search": 18.0,
        "attention and pages": 5.0,
        "window": 0.0,
        "copies": 1.0,
        "idle": 2.0 + 5.0,
    }


def test_every_kernel_of_ours_has_a_part():
    # Prompts are no part of a decode step.
    of_prompts = {"attention_sums", "fold_part", "page_gather", "part_attention"}
    kernels = set(Path(icecache.__file__).with_name("kernels").glob("*.py"))
    kernels -= {path for path in kernels if path.stem in of_prompts}
    names = [name for path in kernels for name in re.findall(r"def (_\w+_kernel)\(", path.read_text())]
    assert len(names) >= 5
    assert all(by_part([(name, 0.0, 1.0)])["model"] == 0.0 for name in names)


def test_lines_of_a_version_that_measured_less_are_still_shown():
    line = {"cell": {"context": 1, "batch": 1, "method": "hf", "budget": 0, "shape": "s", "steps": 1, "seed": 0}}
    line |= {"tpot_ms_p50": 1.0, "kv_device_bytes": 0, "kv_host_bytes": 0, "machine": {}}
    assert "1.00" in table([line])
