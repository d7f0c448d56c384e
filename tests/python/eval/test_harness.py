"""lm-evaluation-harness as the engine gives what our own runner gives, and what `HFLM` gives with full attention."""

from __future__ import annotations

import copy
import functools
import importlib.util
import json
from pathlib import Path

import pytest

if importlib.util.find_spec("lm_eval") is None:
    pytest.skip("lm-eval is not installed", allow_module_level=True)

import lm_eval
from icecache.cli import main
from icecache.errors import ConfigError
from icecache.eval.arms import Arm
from icecache.eval.folder import read_records
from icecache.eval.harness.model import IceHFLM
from icecache.eval.harness.tasks import as_lm_eval_task
from icecache.eval.needle import load_needle
from icecache.eval.options import EvalOptions
from icecache.eval.render import prepare
from icecache.eval.run import run_eval
from icecache.eval.suites import SUITES
from icecache.eval.task import DataDir
from icecache.policies import POLICIES
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

MANAGER = TaskManager(include_defaults=False)  # reading the descriptions of all its tasks takes 15 s
FIXTURES = Path(__file__).parents[2] / "fixtures"
TASKS = {task.name: task for suite in SUITES.values() for task in suite.tasks}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture(scope="module")
def needle():
    return load_needle()


def request(text: str, task: str = "niah_x", **options: object) -> Instance:
    return Instance("generate_until", {}, (text, {"until": [], "max_gen_toks": 12, **options}), 0, (task, 0, 1))


@pytest.mark.parametrize(
    ("suite", "task", "length", "folder"),
    [
        ("needle", "passkey", 512, None),
        ("longbench", "trec", 60, "longbench"),
        ("longbench", "qasper", 90, "longbench"),
    ],
)
def test_both_engines_give_the_same_answers_and_scores(suite, task, length, folder, needle, tmp_path: Path) -> None:
    model, tokenizer = needle
    data = FIXTURES / folder if folder else None
    run_eval(
        EvalOptions(
            out=tmp_path / "run",
            suite=(suite,),
            tasks=(task,),
            lengths=(length,),
            data_dir=data,
            budgets=(64,),
            controls=("full",),
            setup=("A", "B"),
            limit=2,
        )
    )
    ours = {(r.arm, r.setup, r.id): r for r in read_records(tmp_path / "run")}
    assert len(ours) == 8
    config = as_lm_eval_task(TASKS[task], tokenizer, length=length, n=2, data=DataDir(data) if data else None)
    lm = IceHFLM(model, tokenizer)
    for arm in (Arm("full"), Arm("icecache", 64)):
        for setup in ("A", "B"):
            lm.use(arm, setup)
            theirs = lm_eval.simple_evaluate(
                model=lm, tasks=[config], task_manager=MANAGER, bootstrap_iters=0, log_samples=True
            )
            samples = theirs["samples"][config["task"]]
            assert len(samples) == 2
            for sample in samples:
                record = ours[arm.name, setup, sample["doc"]["id"]]
                assert sample["resps"][0][0] == record.prediction
                assert sample["score"] == record.score
            mean = sum(r.score for (a, s, _), r in ours.items() if (a, s) == (arm.name, setup)) / 2
            assert theirs["results"][config["task"]]["score,none"] == pytest.approx(mean)
    hashes = [r.prompt_sha256 for (arm, setup, _), r in ours.items() if (arm, setup) == ("full", "A")]
    assert [served.prompt_sha256 for served in lm.served] == hashes * 4
    if suite == "needle":
        assert ours["full", "B", f"{length}-0-0"].score == 1.0


def test_full_attention_answers_as_the_plain_model_class_does(needle) -> None:
    model, tokenizer = needle
    text = "the special magic number for amber falcon is : 4 2 7 . " * 12 + "what is the special magic number ?"
    plain = HFLM(pretrained=model, tokenizer=tokenizer, add_bos_token=True)
    for setup in ("A", "B"):
        ours = IceHFLM(model, tokenizer, setup=setup)
        assert ours.generate_until(
            [request(text.replace(" what", "\ue000 what"))], disable_tqdm=True
        ) == plain.generate_until([request(text)], disable_tqdm=True)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_answers_within_its_budget(policy: str, needle) -> None:
    lm = IceHFLM(*needle)
    text = "the grass is green . " * 60 + "\ue000what is green ?"
    lm.use(Arm(policy, None if policy == "full" else 64))
    assert lm.generate_until([request(text)], disable_tqdm=True)[0]
    # Policies that keep what is generated may attend to so much more.
    assert policy == "full" or lm.served[0].stats.attended <= 64 + 16 + lm.served[0].n_generated


def test_every_request_is_accounted_for(needle) -> None:
    lm = IceHFLM(*needle, arm=Arm("icecache", 64))
    text = "the grass is green . " * 60 + "\ue000what is green ?"
    lm.generate_until([request(text)], disable_tqdm=True)
    (served,) = lm.served
    assert (served.task, served.arm, served.setup) == ("niah_x", "icecache@64", "B")
    assert served.stats.attended < 100 < served.n_prompt
    assert served.stats.pages > 0


def test_the_template_is_applied_to_the_tasks_that_want_it_and_bos_stands_once(needle) -> None:
    model, tokenizer = needle[0], copy.deepcopy(needle[1])
    tokenizer.chat_template = TEMPLATE
    lm = IceHFLM(model, tokenizer, setup="A")
    seen = []
    lm._fit = lambda sample, fit=lm._fit: seen.append(fit(sample)[0]) or fit(sample)
    chat = lm.apply_chat_template([{"role": "user", "content": "what is green ?"}])
    lm.generate_until([request(chat, "longbench_qasper"), request(chat, "longbench_trec")], disable_tqdm=True)
    with_template, without = (p.context + p.question for p in seen)
    assert with_template.count(tokenizer.bos_token_id) == without.count(tokenizer.bos_token_id) == 1
    assert len(with_template) > len(without) == len(tokenizer("what is green ?").input_ids) + 1


def test_a_prompt_that_is_too_long_loses_its_middle(needle) -> None:
    lm = IceHFLM(*needle, max_length=100)
    text = "first " + "the grass is green . " * 60 + "last \ue000what is green ?"
    lm.generate_until([request(text)], disable_tqdm=True)
    assert lm.served[0].truncated
    assert 80 <= lm.served[0].n_prompt <= 100 - 12 + 8
    with pytest.raises(ConfigError, match="of which 100 have room"):
        lm.generate_until([request(text, max_gen_toks=99)], disable_tqdm=True)


def test_what_cannot_be_served_is_refused(needle) -> None:
    lm = IceHFLM(*needle, arm=Arm("icecache", 64))
    with pytest.raises(ConfigError, match=r"U\+E000"):
        lm.generate_until([request("no mark", "other")], disable_tqdm=True)
    with pytest.raises(ConfigError, match="greedy"):
        lm.generate_until([request("a\ue000b", do_sample=True)], disable_tqdm=True)
    with pytest.raises(ConfigError, match="no decode steps"):
        lm.loglikelihood([], disable_tqdm=True)
    with pytest.raises(ConfigError, match="no-context"):
        lm.use(Arm("no-context"))
    with pytest.raises(ValueError, match="its samples have turns"):
        as_lm_eval_task(TASKS["chase8"], needle[1], length=512, n=1)


@pytest.mark.parametrize(("name", "file"), [("gsm8k_cot", "gsm8k-cot"), ("gsm8k_cot_llama", "gsm8k-cot-llama")])
def test_a_task_of_lm_eval_gets_the_prompt_of_our_suite(name: str, file: str, needle) -> None:
    import yaml

    model, tokenizer = needle[0], copy.deepcopy(needle[1])
    tokenizer.chat_template = TEMPLATE
    path = Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / f"{file}.yaml"
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    rows = str(FIXTURES / "gsm8k" / "test.jsonl")
    config |= {"dataset_path": "json", "dataset_name": None, "dataset_kwargs": {"data_files": {"test": rows}}}
    is_chat = name == "gsm8k_cot_llama"
    lm = IceHFLM(model, tokenizer, arm=Arm("icecache", 64))
    theirs = lm_eval.simple_evaluate(
        model=lm,
        tasks=[config],
        task_manager=MANAGER,
        limit=1,
        bootstrap_iters=0,
        apply_chat_template=is_chat,
        fewshot_as_multiturn=is_chat,
        log_samples=True,
    )
    sample = next(TASKS[name].samples(tokenizer, length=None, n=1, seed=0, data=DataDir(FIXTURES / "gsm8k")))
    prompt = prepare(sample, tokenizer)
    (served,) = lm.served
    assert (served.prompt_sha256, served.n_prompt) == (prompt.sha256, sum(prompt.shape))
    answer = theirs["samples"][name][0]["resps"][0][0]
    scores = theirs["results"][name]
    assert scores["exact_match,flexible-extract"] == TASKS[name].score(answer, sample)
    assert scores["exact_match,strict-match"] == TASKS[name].grades(answer, sample)["strict"]


def test_the_command_runs_a_task_with_every_arm_and_goes_on_where_it_stopped(
    tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setattr("lm_eval.tasks.TaskManager", functools.partial(TaskManager, include_defaults=False))
    rows = FIXTURES / "gsm8k" / "test.jsonl"
    (tmp_path / "sums.yaml").write_text(
        f"task: icecache_test_sums\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {rows}}}}}\n"
        "test_split: test\noutput_type: generate_until\ndoc_to_target: '{{answer}}'\n"
        "doc_to_text: '{{question}}\ue000 A:'\n"
        "generation_kwargs: {until: [], max_gen_toks: 6}\nmetric_list: [{metric: exact_match}]\n"
    )
    out = tmp_path / "out"
    command = ["eval", "harness", "--out", str(out), "--limit", "2", "--budgets", "64", "--include", str(tmp_path)]
    assert main([*command, "--tasks", "icecache_test_sums"]) == 0
    assert {path.name for path in out.iterdir()} == {"full-B.json", "icecache@64-B.json"}
    assert "exact_match" in capsys.readouterr().out
    content = json.loads((out / "icecache@64-B.json").read_text())
    assert [request["n_generated"] for request in content["requests"]] == [6, 6]
    (out / "full-B.json").unlink()
    before = (out / "icecache@64-B.json").stat().st_mtime_ns
    assert main([*command, "--tasks", "icecache_test_sums"]) == 0
    assert (out / "full-B.json").exists()
    assert (out / "icecache@64-B.json").stat().st_mtime_ns == before
    with pytest.raises(SystemExit):
        main([*command, "--tasks", "no_such_task"])
    assert "got no_such_task" in capsys.readouterr().err
