"""The command line: wrong arguments are named, results are written, Ctrl-C is quiet."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from icecache import cli
from icecache.errors import PoolExhaustedError

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "COMMAND"),
        (["dem"], "invalid choice: 'dem'"),
        (
            ["demo", "--length", "many"],
            "argument --length: must be a number of tokens such as 16384 or 16k, got 'many'",
        ),
        (["demo", "--length", "100"], "--length must be in 512..32768, got 100"),
        (["demo", "--length", "64k"], "--length must be in 512..32768, got 65536"),
        (["demo", "--samples", "0"], "--samples must be in 1..1000, got 0"),
        (["demo", "--samples", "two"], "argument --samples: invalid int value: 'two'"),
        (["demo", "--threads", "0"], "--threads must be in 1..1024, got 0"),
        (["demo", "--seed", "-1"], "--seed must be in 0..2147483647, got -1"),
        (["demo", "--tasks", "kv32,kv64"], "--tasks must name tasks of passkey, kv32, .*, got kv64"),
        (["demo", "--tasks", ""], "--tasks must name tasks of .*, got none"),
        (["demo", "--tasks", "vt3,vt3"], "--tasks must name each task once, got vt3, vt3"),
        (["demo", "--qick"], "unrecognized arguments: --qick"),
        (["demo", "--out", __file__], "--out must be a folder, got the file"),
    ],
)
def test_a_wrong_argument_is_named(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.search(complaint, printed.err)


def test_the_package_runs_as_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "icecache", "dem"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "invalid choice: 'dem'" in done.stderr


def test_help_needs_neither_torch_nor_transformers() -> None:
    script = (
        "import sys; from icecache.cli import build_parser; build_parser().format_help();"
        "sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


@pytest.mark.parametrize(
    ("raised", "status", "message"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (PoolExhaustedError("no memory for pages"), 1, "no memory for pages"),
        (PermissionError("cannot write"), 1, "cannot write"),
    ],
)
def test_a_failure_or_ctrl_c_ends_with_one_line_and_a_status(
    raised: BaseException,
    status: int,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    def fail(_: object) -> None:
        raise raised

    monkeypatch.setattr("icecache.demo.run.run_demo", fail)
    assert cli.main(["demo", "--out", str(tmp_path)]) == status
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line == f"icecache: {message}"


def test_the_demo_writes_a_table_with_every_arm_and_two_figures(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    out = tmp_path / "new" / "folder"
    command = ["demo", "--length", "1k", "--samples", "2", "--tasks", "passkey", "--threads", "1", "--out", str(out)]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    for name in ("table.txt", "results.json", "accuracy.png", "pages.png"):
        assert str(out / name) in printed
    for name in ("accuracy.png", "pages.png"):
        assert (out / name).read_bytes().startswith(PNG)
        assert (out / name).stat().st_size > 10_000
    table = (out / "table.txt").read_text()
    labels = [line[:16].strip() for line in table.split("\n\n")[0].splitlines()[2:]]
    budgets = (64, 128, 256)
    arms = [*(f"IceCache {budget}" for budget in budgets), *(f"StreamingLLM {budget}" for budget in budgets)]
    assert labels == ["full KV", *arms]
    assert table in printed
    assert "question : what is the pass key" in table


def test_the_demo_measures_what_the_arms_promise(tmp_path: Path) -> None:
    command = ["demo", "--length", "1k", "--samples", "1", "--tasks", "passkey", "--threads", "1", "--seed", "5"]
    assert cli.main([*command, "--out", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert (results["length"], results["tasks"], results["seed"]) == (1024, ["passkey"], 5)
    measured = {(m["policy"], m["budget"]): m for m in results["measurements"]}
    assert len(measured) == len(results["measurements"]) == 7
    full = measured["full", None]
    assert full["exact_match"]
    assert full["host_bytes"] == 0
    for budget in (64, 128, 256):
        ice, streaming = measured["icecache", budget], measured["streaming", budget]
        # The newest token comes on top, and up to 15 that wait to enter the index.
        assert budget < ice["attended"] <= budget + 16
        assert streaming["attended"] <= budget + 1
        assert ice["host_bytes"] > 0
        assert ice["device_bytes"] < full["device_bytes"]
        assert ice["n_steps"] == streaming["n_steps"] == full["n_steps"]
    assert measured["icecache", 256]["exact_match"]
    assert not measured["streaming", 64]["exact_match"]


def test_doctor_explains_the_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor"]) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    machine = {"system", "cores", "workers", "memory", "locked", "packages", "cuda", "bus", "mailbox"}
    assert set(lines) == machine | {"core", "threads", "model", "mode"}
    assert lines["model"] == "needle-3m loads and finds a passkey"
    assert "torch" in lines["packages"]


def test_doctor_says_who_searches_and_what_stands_in_the_way():
    from icecache.doctor import captured_mode

    assert "14 workers" in captured_mode(14, None)
    assert "too few cores" in captured_mode(0, None)
    assert "op by op" in captured_mode(14, "limit")
    assert "(limit)" in captured_mode(14, "limit")


def test_doctor_fails_when_the_model_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing() -> Path:
        msg = "the shipped model is missing"
        raise FileNotFoundError(msg)

    monkeypatch.setattr("icecache.eval.needle.model.needle_path", missing)
    assert cli.main(["doctor"]) == 1
    assert "model     FAILED: FileNotFoundError: the shipped model is missing" in capsys.readouterr().out
