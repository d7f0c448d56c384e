"""`estimate_unread`: pages that are not read count by their mean values, on the host and on a device."""

from __future__ import annotations

import pytest
import torch
from icecache import IceRuntime
from icecache.errors import CacheStateError, ConfigError
from test_device_search import DEVICE, SMALL, steps, with_device_search
from tiny import build, prompt
from transformers import DynamicCache

N_PROMPT, N_ALL = 700, 702
ESTIMATE = {**SMALL, "estimate_unread": True}


def dense(model, ids):
    """Logits of full attention."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(ids[:, :N_PROMPT], past_key_values=cache)
        return torch.cat(
            [model(ids[:, t : t + 1], past_key_values=cache).logits[:, -1] for t in range(N_PROMPT, N_ALL)]
        )


def error(got, expected):
    return float((got - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def flat():
    """Model whose attention is as flat as in the first layers of trained ones, a text, and full attention's logits."""
    model, ids = build("llama").to(DEVICE), prompt(1, N_ALL).to(DEVICE)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= 0.03
    return model, ids, dense(model, ids)


def test_estimates_bring_steps_nearer_to_full_attention(flat):
    model, ids, full = flat
    errors, masses = [], []
    for settings in (SMALL, ESTIMATE):
        with IceRuntime.wrap(model, **settings) as runtime:
            errors.append(error(steps(runtime, ids, N_PROMPT, N_ALL)[0], full))
            masses.append(runtime.stats().mass_kept)
    assert errors[1] < errors[0] / 3
    assert masses[1] == pytest.approx(masses[0], abs=0.05), "what is estimated is not attended"


@pytest.mark.parametrize("bits", [1, 2])
def test_a_device_estimates_what_the_host_does(flat, bits):
    """Its mean values have 4 bits, its weights come from 1 or 2 bits an element: within .3 of the logits' norm."""
    model, ids, _ = flat
    with IceRuntime.wrap(model, **ESTIMATE) as runtime:
        on_host, mass = steps(runtime, ids, N_PROMPT, N_ALL)[0], runtime.stats().mass_kept
        runtime.reset_stats()
        search = with_device_search(runtime, bits=bits)
        on_device = steps(runtime, ids, N_PROMPT, N_ALL)[0]
        assert search.steps == N_ALL - N_PROMPT
        assert runtime.stats().mass_kept == pytest.approx(mass, abs=0.02)
    assert error(on_device, on_host) < 0.3


def test_a_budget_that_covers_the_context_leaves_nothing_to_estimate():
    model, ids = build("llama").to(DEVICE), prompt(1, N_ALL).to(DEVICE)
    out = []
    for estimate in (False, True):
        with IceRuntime.wrap(model, **{**SMALL, "budget": 1008, "estimate_unread": estimate}) as runtime:
            out.append(steps(runtime, ids, N_PROMPT, N_ALL)[0])
    assert torch.equal(*out)


def test_what_cannot_be_estimated_is_refused():
    model, ids = build("llama").to(DEVICE), prompt(1, 300).to(DEVICE)
    with pytest.raises(ConfigError, match=r"reuse > 1.*reuse=2"):
        IceRuntime.wrap(model, reuse=2, estimate_unread=True)
    with IceRuntime.wrap(model, **SMALL) as runtime:
        _, cache = steps(runtime, ids, 290, 292)
    with IceRuntime.wrap(model, **ESTIMATE) as runtime, pytest.raises(CacheStateError, match="mean values"):
        runtime.adopt(cache)
