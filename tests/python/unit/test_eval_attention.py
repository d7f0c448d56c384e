"""The attention report against a slow reference in numpy, and against what the runtime itself computed."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
import torch
from icecache.cli import main
from icecache.errors import ConfigError, DataError
from icecache.eval import watch
from icecache.eval.attention import run_attention
from icecache.eval.heads import HeadStep, Measured, measure
from icecache.eval.options import EvalOptions

H, G, N, D = 2, 3, 70, 8


def _step(seed, *, softcap=None, per_query=False):
    """Pages of 5 tokens behind 4 sink and before 6 window tokens; 4 pages of 12 chosen."""
    rng = np.random.default_rng(seed)
    tensors = {
        name: torch.from_numpy(rng.normal(size=shape)).float()
        for name, shape in {"query": (H, G, D), "keys": (H, N, D), "values": (H, N, 5), "out": (H, G, 5)}.items()
    }
    page = np.full((H, N), -1)
    attended = np.zeros((H, G, N), bool)
    attended[..., :4] = attended[..., -6:] = True
    for h in range(H):
        page[h, 4:-6] = rng.permutation(np.repeat(np.arange(12), 5))
        choices = [rng.choice(12, 4, replace=False) for _ in range(G)]
        for g in range(G):
            attended[h, g] |= np.isin(page[h], choices[g if per_query else 0])
    return HeadStep(
        **tensors, attended=torch.from_numpy(attended), page=torch.from_numpy(page), scaling=0.7, softcap=softcap
    )


def _reference(step, h):
    """Every measure of a KV head, with loops and by trying every choice of pages."""
    sums = dict.fromkeys(["mass", "error", "recall_16", "recall_64", "regret"], 0.0)
    joint = np.zeros(N)
    for g in range(G):
        logits = np.array([step.scaling * float(step.query[h, g].double() @ k) for k in step.keys[h].double()])
        if step.softcap:
            logits = step.softcap * np.tanh(logits / step.softcap)
        p = np.exp(logits) / np.exp(logits).sum()
        exact = sum(p[i] * step.values[h, i].double().numpy() for i in range(N))
        seen = step.attended[h, g].numpy()
        order = np.argsort(-logits)
        sums["mass"] += p[seen].sum() / G
        sums["error"] += np.linalg.norm(step.out[h, g].numpy() - exact) / np.linalg.norm(exact) / G
        sums["recall_16"] += np.mean([seen[i] for i in order[:16]]) / G
        sums["recall_64"] += np.mean([seen[i] for i in order[:64]]) / G
        sums["regret"] += (p[order[: seen.sum()]].sum() - p[seen].sum()) / G
        joint += p / G
    page, seen = step.page[h].numpy(), step.attended[h, 0].numpy()
    pages = sorted(set(page[page >= 0]))
    chosen = set(page[seen]) - {-1}
    of = {j: joint[page == j].sum() for j in pages}
    best = max(sum(of[j] for j in some) for some in itertools.combinations(pages, len(chosen)))
    best_tokens = np.sort(joint[page >= 0])[::-1][: 5 * len(chosen)].sum()
    return {**sums, "packing": best_tokens - best, "search": best - sum(of[j] for j in chosen)}


def _measured(step):
    return [Measured(*of_head) for of_head in measure(step).tolist()]


@pytest.mark.parametrize("softcap", [None, 1.5])
def test_measures_equal_a_slow_reference(softcap):
    step = _step(1, softcap=softcap)
    for h, measured in enumerate(_measured(step)):
        for name, value in _reference(step, h).items():
            assert getattr(measured, name) == pytest.approx(value, abs=1e-6), name
        assert measured.packing > 0
        assert measured.search > 0
        assert measured.attended == 30


def test_the_exact_output_over_everything_has_no_error_and_no_regret():
    step = _step(2)
    weights = torch.softmax(torch.einsum("hgd,hnd->hgn", step.query, step.keys) * step.scaling, -1)
    step = HeadStep(
        query=step.query,
        keys=step.keys,
        values=step.values,
        out=weights @ step.values,
        attended=torch.ones_like(step.attended),
        page=step.page,
        scaling=step.scaling,
        softcap=None,
    )
    for measured in _measured(step):
        assert (measured.mass, measured.recall_16, measured.recall_64) == pytest.approx((1, 1, 1))
        assert (measured.error, measured.regret, measured.search) == pytest.approx((0, 0, 0), abs=1e-5)


def test_regret_is_split_only_where_whole_pages_are_chosen_for_the_kv_head():
    assert all(math.isnan(m.packing) and math.isnan(m.search) for m in _measured(_step(3, per_query=True)))
    step = _step(3)
    first = int((step.attended[0, 0] & (step.page[0] >= 0)).nonzero()[0])
    step.attended[0, :, first] = False
    halved, whole = _measured(step)
    assert math.isnan(halved.packing)
    assert whole.packing > 0


POLICIES = ("icecache", "random", "quest", "token-oracle-q", "snapkv", "streaming")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The shipped model under five policies; the steps as they were measured, and the rows."""
    out, steps = tmp_path_factory.mktemp("attention"), []
    torch.set_num_threads(1)

    def kept(step):
        steps.append(step)
        return measure(step)

    options = EvalOptions(
        out=out, tasks=("kv32",), lengths=(512,), policies=POLICIES, budgets=(96,), controls=(), limit=1
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch, "measure", kept)
        rows = run_attention(options, lambda _: None)
    return out, steps, rows


def test_what_is_watched_is_what_was_computed(run):
    """Softmax over the watched keys, masked by the watched choice, is the output that the runtime gave."""
    _, steps, _ = run
    assert len(steps) > 50
    for step in steps:
        logits = torch.einsum("hgd,hnd->hgn", step.query, step.keys) * step.scaling
        masked = logits.masked_fill(~step.attended, -torch.inf)
        torch.testing.assert_close(torch.softmax(masked, -1) @ step.values, step.out, rtol=2e-4, atol=2e-4)


def test_every_token_behind_sink_and_window_has_one_page(run):
    _, steps, _ = run
    paged = [step for step in steps if step.page is not None]
    assert paged
    for step in paged:
        for page, attended in zip(step.page, step.attended, strict=True):
            assert int(torch.bincount(page[page >= 0]).max()) <= 16
            assert bool(attended[:, page < 0].all())


def test_the_rows_say_what_policies_are_known_for(run):
    _, _, rows = run
    by_arm = {arm: [r for r in rows if r.arm == f"{arm}@96"] for arm in POLICIES}
    mass = {arm: np.mean([r.means["mass"] for r in found]) for arm, found in by_arm.items()}
    assert mass["token-oracle-q"] >= max(mass.values())
    assert mass["icecache"] > mass["random"] + 0.1
    assert mass["icecache"] > mass["streaming"] + 0.1
    assert all(r.means["attended"] == pytest.approx(97, abs=1) for r in by_arm["streaming"])
    search = {arm: np.mean([r.means["search"] for r in by_arm[arm]]) for arm in ("icecache", "random")}
    assert search["random"] > 5 * search["icecache"]
    assert all(r.means["packing"] >= -1e-9 for arm in ("icecache", "random") for r in by_arm[arm])
    assert all(r.calibration < 1e-4 for arm in ("quest", "token-oracle-q", "snapkv") for r in by_arm[arm])
    assert all(r.calibration is None for r in by_arm["random"])
    assert all(r.calibration < 0.1 for r in by_arm["icecache"])
    assert {(r.layer, r.head) for r in by_arm["icecache"]} == {(r.layer, r.head) for r in by_arm["quest"]}


def test_the_report_is_written_as_json_and_markdown(run):
    out, _, rows = run
    data = json.loads((out / "attention.json").read_text(encoding="utf-8"))
    assert len(data["heads"]) == len(rows)
    assert data["model"] == "needle-3m"
    text = (out / "attention.md").read_text(encoding="utf-8")
    head = f"| {rows[0].arm} "
    lines = [line for line in text.partition("## By KV head")[2].splitlines() if line.startswith(head)]
    assert len(lines) == sum(row.arm == rows[0].arm for row in rows)
    assert f"{rows[0].means['mass']:.3f}" in lines[0]


def test_a_budget_over_everything_keeps_everything(tmp_path):
    options = EvalOptions(out=tmp_path, tasks=("kv32",), lengths=(256,), budgets=(512,), controls=(), limit=1)
    for row in run_attention(options, lambda _: None):
        assert row.means["mass"] == pytest.approx(1, abs=1e-9)
        assert row.means["error"] < 1e-5


def test_what_cannot_be_measured_is_refused(tmp_path, capsys):
    with pytest.raises(ConfigError, match="policies with a budget, got full"):
        run_attention(EvalOptions(out=tmp_path, policies=("full",), controls=()), lambda _: None)
    (tmp_path / "file").write_text("")
    below = EvalOptions(out=tmp_path / "file" / "below", tasks=("kv32",), lengths=(256,), controls=(), limit=1)
    with pytest.raises(DataError, match="cannot write"):  # before anything is measured
        run_attention(below, pytest.fail)
    short = ("dense_below=4096",)
    dense = EvalOptions(out=tmp_path, tasks=("kv32",), lengths=(256,), controls=(), limit=1, settings=short)
    with pytest.raises(DataError, match="no layer read pages"):
        run_attention(dense, lambda _: None)
    with pytest.raises(SystemExit):
        main(["eval", "attention", "--out", str(tmp_path), "--policies", "nonsense"])
    assert "nonsense" in capsys.readouterr().err


def test_needle_tasks_can_be_named_for_any_model(tmp_path):
    other = EvalOptions(out=tmp_path, model=str(tmp_path / "none"), tasks=("kv_dense",), controls=())
    with pytest.raises((ConfigError, DataError), match="none"):  # the model is what is missing, not the task
        run_attention(other, lambda _: None)
