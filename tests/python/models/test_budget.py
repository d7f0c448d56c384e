"""Under a small budget exactly the promised tokens are attended, and the output is attention over exactly these."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from icecache import IceRuntime
from oracle import attended_positions, best_pages, check_decode_outputs, history, watch
from tiny import build, left_padded, prompt
from transformers import DynamicCache

BUDGET, SINK, WINDOW = 112, 16, 32  # four pages
HEADS, GROUP = 2, 2


def run(model, monkeypatch, inputs, n_new, **settings):
    with IceRuntime.wrap(model, budget=BUDGET, dense_below=0, threads=1, **settings) as runtime:
        calls, events = watch(runtime, monkeypatch)
        model.generate(**inputs, max_new_tokens=n_new, do_sample=False)
        return calls, events, runtime.stats()


@pytest.mark.parametrize("lengths", [[200], [230, 90, 161]])
@pytest.mark.parametrize("policy", ["icecache", "page-oracle", "token-oracle", "random"])
def test_the_output_is_attention_over_exactly_the_tokens_that_were_read(monkeypatch, policy, lengths):
    model = build("llama")
    calls, events, stats = run(model, monkeypatch, left_padded(lengths), 20, policy=policy)
    check_decode_outputs(calls, events, range(3), lengths, 19)
    assert stats.attended_max <= BUDGET + 1 + 15


@pytest.mark.usefixtures("reference")
@pytest.mark.parametrize("policy", ["icecache", "page-oracle"])
def test_full_pages_make_the_attended_tokens_exactly_the_budget(monkeypatch, policy):
    _, events, _ = run(build("llama"), monkeypatch, {"input_ids": prompt(1, 16 + 160 + 32)}, 33, policy=policy)
    for event in events:
        waiting = event.lengths[0] - event.window_start[0] - WINDOW - 1
        assert 0 <= waiting <= 15
        for head in range(HEADS):
            assert len(attended_positions(event, 0, head)) == BUDGET + 1 + waiting
    assert len(events) == 3 * 32


@pytest.mark.usefixtures("reference")
def test_the_chosen_pages_are_those_with_the_largest_mass_over_the_group(monkeypatch):
    calls, events, stats = run(build("llama"), monkeypatch, {"input_ids": prompt(1, 16 + 160 + 32)}, 12)
    kept = []
    for layer in range(3):
        keys, _ = history(calls, layer, 0, 0)
        decode = [call for i, call, _ in calls if i == layer and call.query.shape[2] == 1]
        for call, event in zip(decode, [e for e in events if e.layer == layer], strict=True):
            n = event.lengths[0]
            for head in range(HEADS):
                group = call.query[0, head * GROUP : (head + 1) * GROUP, 0]
                want = best_pages(group, keys[head], SINK, event.window_start[0], call.scaling, 4)
                assert set(event.pages[0, head].tolist()) == want
                weights = torch.softmax(group.double() @ keys[head, :n].double().T * call.scaling, -1)
                kept += weights[:, attended_positions(event, 0, head)].sum(1).tolist()
    assert math.isclose(stats.mass_kept, float(np.mean(kept)), rel_tol=1e-5)


def test_the_token_oracle_keeps_at_least_the_mass_of_the_page_oracle_and_that_of_the_search():
    model, mass = build("llama"), {}
    for policy in ("token-oracle", "page-oracle", "icecache"):
        with IceRuntime.wrap(model, budget=BUDGET, dense_below=0, policy=policy) as runtime, torch.no_grad():
            ids, cache = prompt(1, 600), runtime.new_cache()
            model(ids, past_key_values=cache, use_cache=True)
            # The first layer sees the same queries under every policy.
            for i in range(10):
                model(prompt(1, 1, seed=i), past_key_values=cache, use_cache=True)
            mass[policy] = runtime.stats().mass_kept
    assert mass["token-oracle"] > mass["page-oracle"] - 0.01
    assert mass["page-oracle"] >= mass["icecache"] - 0.02


def test_random_pages_are_the_same_for_the_same_seed_and_differ_between_seeds(monkeypatch):
    pages = []
    for seed in (0, 0, 1):
        _, events, _ = run(build("llama"), monkeypatch, {"input_ids": prompt(1, 260)}, 6, policy="random", seed=seed)
        pages.append(np.stack([np.sort(e.pages, -1) for e in events if e.layer == 0]))
    assert np.array_equal(pages[0], pages[1])
    assert not np.array_equal(pages[0], pages[2])


def test_streaming_attends_the_first_four_and_the_last_tokens_of_its_budget_and_nothing_else():
    model, ids = build("llama"), prompt(1, 300)

    def masked(n):
        """Plain attention with everything between sink and window hidden."""
        seen = torch.zeros(1, 1, 1, n, dtype=torch.bool)
        seen[..., :4] = seen[..., n - 1 - (BUDGET - 4) :] = True
        return seen

    plain, expected, got = DynamicCache(), [], []
    with torch.no_grad():
        model(ids[:, :280], past_key_values=plain, use_cache=True)
        for i in range(280, 300):
            out = model(ids[:, i : i + 1], past_key_values=plain, use_cache=True, attention_mask=masked(i + 1))
            expected.append(out.logits)
        with IceRuntime.wrap(model, budget=BUDGET, dense_below=0, policy="streaming") as runtime:
            cache = runtime.new_cache()
            model(ids[:, :280], past_key_values=cache, use_cache=True)
            steps = (ids[:, i : i + 1] for i in range(280, 300))
            got += [model(step, past_key_values=cache, use_cache=True).logits for step in steps]
            stats = runtime.stats()
    assert (torch.cat(got) - torch.cat(expected)).abs().max() <= 1e-4 * torch.cat(expected).abs().max()
    assert stats.attended_min == stats.attended_max == BUDGET + 1
    assert stats.pages_read == stats.host_bytes == 0


def test_nothing_is_recorded_without_a_trace_and_everything_read_is_counted(monkeypatch):
    _, events, stats = run(build("llama"), monkeypatch, {"input_ids": prompt(1, 260)}, 6)
    pages = sum(int((e.pages >= 0).sum()) for e in events)
    assert pages == stats.pages_read
    tokens = sum(int((e.positions >= 0).sum()) for e in events)
    assert stats.bytes_to_device == tokens * 2 * 16 * 4  # K and V, head dim, float32
    assert stats.steps == 5
    elsewhere = {"insert_wait", "summaries"}  # of steps on a device
    assert set(stats.ms) == {"prefill_offload", "index_build", "search", "transfer", "attention"} | elsewhere
    assert all((stats.ms[part] > 0) == (part not in elsewhere) for part in stats.ms)
