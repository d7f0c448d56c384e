"""The paper's tables: commands that this version takes, tables as printed, and models as long as they are."""

from __future__ import annotations

import shlex

import pytest
from icecache.cli import build_parser, main
from icecache.errors import ConfigError
from icecache.eval.commands import run_command
from icecache.eval.folder import RunFolder
from icecache.eval.model import most_positions
from icecache.eval.options import EvalOptions
from icecache.eval.paper import BUDGETS, MODELS, command, find_model, paper, parts_of
from icecache.eval.record import ArmStats, Manifest, Record
from icecache.eval.suites import SUITES, choose_tasks
from transformers import LlamaConfig, Qwen3Config


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.checkpoint)
def test_every_command_is_one_that_this_version_takes(model, tmp_path):
    for part in parts_of(model):
        words = shlex.split(command(model.checkpoint, part, tmp_path, tmp_path))
        args = vars(build_parser().parse_args(words[1:]))
        given = {k: v for k, v in args.items() if k in EvalOptions.__dataclass_fields__ and v is not None}
        options = EvalOptions(**given)
        assert choose_tasks(options.suite, options.tasks)
        assert {f"icecache@{b}" for b in BUDGETS} <= {arm.name for arm in options.arms()}


def test_longbench_is_the_papers_16_sets():
    assert len(SUITES[parts_of(MODELS[0])[0].suite].default_tasks) == 16


def test_a_model_is_found_by_a_part_of_its_name():
    assert find_model("longchat").checkpoint == "lmsys/longchat-7b-v1.5-32k"
    assert find_model("/models/Llama-3.1-8B-Instruct/") is MODELS[0]
    for name in ("7b", "gpt2"):
        with pytest.raises(ConfigError, match="must be one of"):
            find_model(name)


QASPER, NARRATIVE = "authors/qasper", "authors/narrativeqa"


def _records(task, arm, score, n=4):
    for i in range(n):
        stats = ArmStats(1.0, 1.0, 1, 1, None, 1.0, 0.1)
        budget = int(arm.partition("@")[2] or 0) or None
        yield Record("longbench", task, str(i), arm, "A", f"{task}{i}", 9, 1, "", ("",), score, budget, 0, stats)


def test_what_has_run_is_printed_as_the_paper_prints_it(tmp_path):
    manifest = Manifest({"model": "m"}, {}, {}, {}, ())
    with RunFolder(tmp_path / "longbench", manifest, resume=False) as folder:
        for task, full, ours in [(QASPER, 0.4, 0.3), (NARRATIVE, 0.2, 0.21)]:
            folder.add([*_records(task, "full", full), *_records(task, "icecache@256", ours)])
        folder.add([*_records(QASPER, "icecache@64", 0.25)])
    text = list(paper("Llama-3.1-8B-Instruct", tmp_path, tmp_path))
    (shown,) = [part for part in text if part.startswith("| arm")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in shown.splitlines()]
    assert rows[0] == ["arm", NARRATIVE, QASPER, "average", "% of full"]
    assert rows[2:] == [
        ["full", "20.0", "40.0", "30.0", "100.0"],
        ["icecache@64", "-", "25.0", "-", "-"],
        ["icecache@256", "21.0", "30.0", "25.5", "85.0"],
    ]
    assert text.count("Not run yet.") == 3


def test_the_command_prints_the_plan(tmp_path, capsys):
    assert main(["eval", "paper", "--model", "qwen3-32b", "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "YaRN" in printed
    assert printed.count("icecache eval run --model Qwen/Qwen3-32B") == 4
    args = build_parser().parse_args(["eval", "paper", "--model", "gpt2"])
    with pytest.raises(ConfigError, match="Qwen3-32B"):
        run_command(args)


def test_scaled_positions_count():
    linear = {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e4}
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "rope_theta": 1e6}
    llama3 = {
        "rope_type": "llama3",
        "factor": 8.0,
        "original_max_position_embeddings": 8192,
        "rope_theta": 5e5,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
    }
    assert most_positions(LlamaConfig(max_position_embeddings=4096, rope_parameters=linear)) == 32768
    assert most_positions(Qwen3Config(max_position_embeddings=40960, rope_parameters=yarn)) == 131072
    assert most_positions(LlamaConfig(max_position_embeddings=131072, rope_parameters=llama3)) == 131072
    assert most_positions(LlamaConfig(max_position_embeddings=2048)) == 2048
