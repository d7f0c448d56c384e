"""A run writes what it should, goes on where it was killed, and refuses what could not end well before it starts."""

from __future__ import annotations

import json
import shlex
import shutil
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from icecache.cli import build_parser
from icecache.config import IceConfig
from icecache.errors import ConfigError, DataError
from icecache.eval.arms import Arm, arm_config
from icecache.eval.folder import MANIFEST, SAMPLES, RunFolder, merge_folders, read_manifest, read_records
from icecache.eval.needle import needle_path
from icecache.eval.options import EvalOptions
from icecache.eval.prefill import ready_kernels
from icecache.eval.progress import Progress
from icecache.eval.run import run_eval
from icecache.hf import graph
from icecache.hf.capture import capture


def _options(out, **changes):
    given = {
        "suite": ("needle",),
        "tasks": ("kv32",),
        "lengths": (512,),
        "budgets": (64,),
        "limit": 3,
        "batch": 2,
        **changes,
    }
    return EvalOptions(out=out, **given)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    lines = []
    policies = ("icecache", "snapkv", "quest")
    run_eval(
        _options(out, setup=("A", "B"), policies=policies), write=lines.append, command=["icecache", "eval", "run"]
    )
    return out, lines


def _scores(folder):
    scores = defaultdict(list)
    for record in read_records(folder):
        scores[record.arm, record.setup].append(record.score)
    return scores


def test_every_arm_answers_every_sample_in_both_setups(run):
    scores = _scores(run[0])
    arms = {
        "full",
        "exact",
        "random@64",
        "streaming@64",
        "no-context",
        "full-eager",
        "icecache@64",
        "snapkv@64",
        "quest@64",
    }
    assert set(scores) == {(arm, setup) for arm in arms for setup in "AB"}
    assert all(len(values) == 3 for values in scores.values())
    for setup in "AB":
        assert scores["full", setup] == scores["exact", setup] == scores["full-eager", setup] == [1.0] * 3
        assert sum(scores["icecache@64", setup]) >= 2
        assert sum(scores["random@64", setup] + scores["streaming@64", setup] + scores["no-context", setup]) <= 1


def test_exact_runs_op_by_op_and_other_arms_as_the_settings_say():
    assert arm_config(Arm("exact"), IceConfig(), 16_384).decode == "eager"
    assert arm_config(Arm("icecache", 64), IceConfig(), 16_384) == IceConfig(budget=64)


def test_a_step_on_a_gpu_is_kept_from_kernels_that_plan_anew_for_every_length():
    model, before = SimpleNamespace(device=torch.device("cuda")), torch.backends.cuda.cudnn_sdp_enabled()
    with ready_kernels(model):
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.flash_sdp_enabled()
    assert torch.backends.cuda.cudnn_sdp_enabled() == before


def test_exact_gives_the_tokens_of_full_and_arms_are_charged_what_they_read(run):
    by_arm = defaultdict(dict)
    for record in read_records(run[0]):
        by_arm[record.arm][record.id, record.setup] = record
    for key, full in by_arm["full"].items():
        assert by_arm["exact"][key].prediction == full.prediction
        assert full.stats.attended > 450
        assert 64 < by_arm["icecache@64"][key].stats.attended <= 64 + 16
        assert by_arm["streaming@64"][key].stats.attended == 65
        quest = by_arm["quest@64"][key].stats
        assert 48 < quest.attended <= 80
        assert quest.loaded > 1.2 * quest.attended  # each query head has pages of its own
        assert by_arm["snapkv@64"][key].stats.generated_kept == "all"
        assert by_arm["no-context"][key].n_prompt < 40
        assert by_arm["no-context"][key].prompt_sha256 == full.prompt_sha256


@pytest.mark.gpu
def test_on_a_gpu_our_arms_are_graphs_and_exact_still_gives_the_tokens_of_full(tmp_path, monkeypatch):
    captured = []

    def counted(own, step, *arguments):
        captured.append(step.engine.config.budget)
        return capture(own, step, *arguments)

    monkeypatch.setattr(graph, "capture", counted)
    controls = ("full", "exact", "random")
    run_eval(
        _options(tmp_path, device="cuda", lengths=(2048,), limit=4, batch=4, controls=controls), write=lambda _: None
    )
    assert set(captured) == {64}  # exact runs op by op: its budget is another
    said = defaultdict(list)
    for record in read_records(tmp_path):
        said[record.arm].append(record.prediction)
    assert said["exact"] == said["full"]
    assert _scores(tmp_path)["icecache@64", "B"].count(1.0) >= 3
    assert _scores(tmp_path)["random@64", "B"].count(1.0) <= 1


def test_the_manifest_says_how_it_was_made(run):
    manifest = read_manifest(run[0])
    assert manifest.parts[0].command == "icecache eval run"
    assert manifest.identity["model"] == "needle-3m"
    assert len(str(manifest.identity["model_sha256"])) == 64
    assert manifest.parts[0].versions["torch"].startswith(torch.__version__.partition("+")[0])
    assert "synthetic" in manifest.labels["needle"]
    assert manifest.metrics == {"kv32": "exact match"}


def test_a_killed_run_goes_on_and_ends_as_if_it_had_not_been_killed(run, tmp_path):
    whole = (run[0] / SAMPLES).read_bytes().splitlines(keepends=True)
    shutil.copy(run[0] / MANIFEST, tmp_path)
    # Killed inside a batch, and inside a line.
    (tmp_path / SAMPLES).write_bytes(b"".join(whole[:23]) + whole[23][:100])
    run_eval(
        _options(tmp_path, setup=("A", "B"), policies=("icecache", "snapkv", "quest"), resume=True),
        write=lambda _: None,
    )
    resumed = {r.key: (r.prediction, r.score, r.prompt_sha256) for r in read_records(tmp_path)}
    assert resumed == {r.key: (r.prediction, r.score, r.prompt_sha256) for r in read_records(run[0])}
    lines = (tmp_path / SAMPLES).read_bytes().splitlines(keepends=True)
    assert len(lines) == len(whole)
    assert lines[:23] == whole[:23]
    assert len(read_manifest(tmp_path).parts) == 2
    # Nothing left: the model is not even loaded.
    before = (tmp_path / SAMPLES).read_bytes()
    run_eval(
        _options(tmp_path, setup=("A", "B"), policies=("icecache", "snapkv", "quest"), resume=True),
        write=lambda _: None,
    )
    assert (tmp_path / SAMPLES).read_bytes() == before


def test_records_made_otherwise_are_not_mixed(run, tmp_path):
    shutil.copytree(run[0], tmp_path / "r")
    with pytest.raises(ConfigError, match="--resume to go on"):
        run_eval(_options(tmp_path / "r"))
    with pytest.raises(ConfigError, match="seed was 0, now 1"):
        run_eval(_options(tmp_path / "r", seed=1, resume=True), write=lambda _: None)
    with pytest.raises(ConfigError, match="settings was"):
        run_eval(_options(tmp_path / "r", settings=("window_tokens=16",), resume=True), write=lambda _: None)


def test_a_full_disk_says_so_and_keeps_what_is_there(tmp_path):
    (tmp_path / SAMPLES).symlink_to("/dev/full")
    with pytest.raises(DataError, match=r"disk is full; 0 records are safe.*--resume"):
        run_eval(_options(tmp_path, controls=("no-context",), policies=()), write=lambda _: None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"suite": ("needle", "nothing")}, "--suite must name suites of needle"),
        ({"tasks": ("kv33",)}, "--tasks must name tasks of passkey"),
        ({"policies": ("icecahe",)}, "--policies must name policies of"),
        ({"controls": ("dense",)}, "--controls must name controls of full"),
        ({"budgets": ()}, "--budgets must name at least one"),
        ({"budgets": (65,)}, "budget must be"),
        ({"lengths": (65536,)}, "at most the model's 32768 positions"),
        ({"setup": ("C",)}, "--setup must be one of A, B"),
        ({"batch": 0}, "--batch must be an integer in 1"),
        ({"settings": ("windw=1",)}, "--set must be KEY=VALUE"),
        ({"settings": ("budget=64",)}, "use --budgets"),
        ({"settings": ("window_tokens=x",)}, "must be an integer"),
        ({"device": "cuda:99"}, "--device cuda:99 cannot be used"),
    ],
)
def test_a_wrong_option_is_named_before_anything_runs(tmp_path, changes, message):
    with pytest.raises(ConfigError, match=message):
        run_eval(_options(tmp_path / "r", **changes), write=lambda _: None)
    samples = tmp_path / "r" / SAMPLES
    assert not samples.exists() or not samples.read_bytes()


def test_a_model_that_is_not_there_or_cannot_read_is_named(tmp_path):
    with pytest.raises(DataError, match=r"--model .*no model there"):
        run_eval(_options(tmp_path / "r", model=str(tmp_path / "none")), write=lambda _: None)
    mute = tmp_path / "mute"
    mute.mkdir()
    shutil.copy(needle_path() / "config.json", mute)
    with pytest.raises(DataError, match="no tokenizer"):
        run_eval(_options(tmp_path / "r", model=str(mute)), write=lambda _: None)


def _spoiled(folder, spoil):
    """Copy the shipped model and spoil it."""
    shutil.copytree(needle_path(), folder)
    spoil(folder)
    return str(folder)


def _cut(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])


def _other_shape(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 100}))


def _one_layer_more(folder):
    config = json.loads((folder / "config.json").read_text())
    more = {"num_hidden_layers": 5, "layer_types": None}
    (folder / "config.json").write_text(json.dumps({**config, **more}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_cut, "weights cannot be read: .*not fully covered"),
        (_other_shape, "weights cannot be read"),
        (_one_layer_more, r"lack 9 weights of the model, such as model\.layers\.4"),
    ],
)
def test_weights_that_are_damaged_or_not_all_there_are_no_model(tmp_path, spoil, message):
    with pytest.raises(DataError, match=message):
        run_eval(_options(tmp_path / "r", model=_spoiled(tmp_path / "m", spoil)), write=lambda _: None)


def test_a_context_longer_than_the_model_is_found_before_it_runs(tmp_path):
    short = tmp_path / "short"
    shutil.copytree(needle_path(), short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 512}))
    # kv_rand and others come to their length exactly; one token more than the positions is refused.
    run_eval(_options(tmp_path / "r", model=str(short), limit=1, controls=("full",), policies=()), write=lambda _: None)
    with pytest.raises(ConfigError, match="512 positions"):
        run_eval(_options(tmp_path / "s", model=str(short), lengths=(513,)), write=lambda _: None)


def test_a_folder_that_cannot_be_written_and_data_that_is_not_there_are_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="--out must be a folder"):
        _options(tmp_path / "file")
    with pytest.raises(DataError, match="cannot write"):
        run_eval(_options(tmp_path / "file" / "below"), write=lambda _: None)
    with pytest.raises(DataError, match="--data-dir must be a folder"):
        run_eval(_options(tmp_path / "r", data_dir=tmp_path / "none"), write=lambda _: None)


def test_too_large_a_batch_for_the_device_says_what_to_do(tmp_path, monkeypatch):
    def explode(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("icecache.eval.run.prefill", explode)
    with pytest.raises(DataError, match=r"memory does not hold 2 prompts.*smaller --batch"):
        run_eval(_options(tmp_path), write=lambda _: None)


def test_the_time_left_is_estimated_from_each_arms_own_speed():
    now, lines = [0.0], []
    progress = Progress({"full": 10.0, "exact": 20.0}, lines.append, every_s=5, clock=lambda: now[0])
    now[0] = 4.0
    progress.add("full", 5, 4.0, "kv")
    assert not lines
    assert progress.left_s() == pytest.approx(5 * 0.8 + 20 * 0.8)  # exact is not known yet: as fast as the mean
    now[0] = 64.0
    progress.add("exact", 10, 60.0, "kv")
    assert progress.left_s() == pytest.approx(5 * 0.8 + 10 * 6.0)
    assert lines == ["kv: 50% done in 1:04, about 1:04 left"]


def test_the_documented_commands_are_understood():
    text = (Path(__file__).parents[3] / "docs" / "eval.md").read_text(encoding="utf-8")
    commands = [line.partition("#")[0].replace("...", "") for line in text.splitlines() if line.startswith("icecache ")]
    assert len(commands) >= 6
    for command in commands:
        assert build_parser().parse_args(shlex.split(command)[1:]).command == "eval"


def test_data_that_changed_and_a_damaged_line_are_refused(run, tmp_path):
    manifest = read_manifest(run[0])
    shutil.copytree(run[0], tmp_path / "r")
    (tmp_path / "r" / MANIFEST).write_text(replace(manifest, data={"a.jsonl": "1"}).to_json())
    with pytest.raises(ConfigError, match=r"data file a\.jsonl has changed"):
        RunFolder(tmp_path / "r", replace(manifest, data={"a.jsonl": "2"}), resume=True)
    with RunFolder(tmp_path / "r", replace(manifest, data={"b.jsonl": "3"}), resume=True) as folder:
        assert folder.manifest.data == {"a.jsonl": "1", "b.jsonl": "3"}
    lines = (tmp_path / "r" / SAMPLES).read_text().splitlines(keepends=True)
    (tmp_path / "r" / SAMPLES).write_text("".join([lines[0], lines[1][:50] + "\n", *lines[2:]]))
    with pytest.raises(DataError, match=r"samples\.jsonl, line 2: not a record"):
        list(read_records(tmp_path / "r"))


def test_runs_of_one_model_are_merged_and_others_are_not(run, tmp_path):
    manifest, records = read_manifest(run[0]), list(read_records(run[0]))
    half = len(records) // 2
    for name, part in {"a": records[: half + 1], "b": records[half:]}.items():
        with RunFolder(tmp_path / name, manifest, resume=False) as folder:
            folder.add(part)
    assert merge_folders([tmp_path / "a", tmp_path / "b"], tmp_path / "both") == len(records)
    assert list(read_records(tmp_path / "both")) == records
    assert len(read_manifest(tmp_path / "both").parts) == 2 * len(manifest.parts)
    other = replace(manifest, identity={**manifest.identity, "seed": 9})
    (tmp_path / "b" / MANIFEST).write_text(other.to_json())
    with pytest.raises(ConfigError, match=r"eval merge: the records in .*b were made otherwise: seed was 0, now 9"):
        merge_folders([tmp_path / "a", tmp_path / "b"], tmp_path / "new")
    assert not (tmp_path / "new").exists()
