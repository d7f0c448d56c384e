"""Mask policies on a GPU attend to what they attend to on the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from icecache import IceConfig, IceRuntime
from icecache.policies import POLICIES, Prefill, make_policy
from tiny import build, prompt

MASKED = [name for name in POLICIES if make_policy(name, IceConfig()).masks is not None]


def attended(model, ids, policy, dtype):
    """Masks of every layer in three steps, and what they cost; on the CPU."""
    events = []
    with IceRuntime.wrap(model, policy=Prefill(attention=True)) as runtime, torch.no_grad():
        cache = runtime.new_cache()
        model(ids[:, :300], past_key_values=cache)
    with IceRuntime.wrap(model, policy=policy, budget=64, dense_below=0) as runtime, torch.no_grad():
        own = runtime.adopt(cache)
        runtime.trace = events.append
        for i in range(300, 303):
            out = model(ids[:, i : i + 1], past_key_values=own).logits
        assert out.isfinite().all()
        assert out.dtype == dtype
        stats = runtime.stats()
    return [event.attended for event in events if event.attended is not None], stats


@pytest.mark.gpu
@pytest.mark.parametrize("policy", [name for name in MASKED if name != "oracle-sampling"])
def test_masks_on_a_gpu_are_those_of_the_cpu(policy):
    model, ids = build("llama"), prompt(2, 303)
    expected, of_cpu = attended(model, ids, policy, torch.float32)
    got, of_gpu = attended(copy.deepcopy(model).to("cuda"), ids.to("cuda"), policy, torch.float32)
    # Rounding may swap two tokens at the edge of a choice.
    differ = sum(int((a != b).sum()) for a, b in zip(expected, got, strict=True))
    assert differ <= 0.02 * max(1, sum(int(a.sum()) for a in expected))
    assert abs(of_cpu.attended_mean - of_gpu.attended_mean) <= 0.02 * of_cpu.attended_mean


@pytest.mark.gpu
@pytest.mark.parametrize("policy", MASKED)
def test_masks_run_on_a_gpu_in_bfloat16(policy):
    model = build("llama").to("cuda", torch.bfloat16)
    masks, stats = attended(model, prompt(2, 303).to("cuda"), policy, torch.bfloat16)
    assert (len(masks) > 0) == (policy != "full")
    # Sampling draws some tokens more than once, and how many depends on the device's generator.
    assert stats.attended_mean > (6 if policy == "oracle-sampling" else 8)
