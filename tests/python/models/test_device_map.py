"""A model that accelerate spreads over devices generates through our pages all the same."""

from __future__ import annotations

import copy

import pytest
import torch
from icecache import IceRuntime
from tiny import build, prompt
from transformers import AutoModelForCausalLM, PreTrainedModel

accelerate = pytest.importorskip("accelerate")


def _assert_same_tokens(dispatched: PreTrainedModel, plain: PreTrainedModel) -> None:
    ids = prompt(1, 150)
    expected = plain.generate(ids, max_new_tokens=20, do_sample=False)
    with IceRuntime.wrap(dispatched, budget=512, dense_below=0) as runtime:
        got = dispatched.generate(ids, max_new_tokens=20, do_sample=False, eos_token_id=None)
        assert runtime.stats().pages_read > 0
    assert torch.equal(got, expected)


def test_a_model_loaded_with_an_automatic_device_map_generates_the_same(tmp_path):
    plain = build("llama")
    plain.save_pretrained(tmp_path)
    _assert_same_tokens(AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto", dtype=torch.float32), plain)


def test_a_model_whose_weights_visit_the_device_layer_by_layer_generates_the_same():
    plain = build("llama")
    offloaded = accelerate.cpu_offload(copy.deepcopy(plain), execution_device=torch.device("cpu"))
    assert any(p.is_meta for p in offloaded.parameters()), "nothing was offloaded"
    _assert_same_tokens(offloaded, plain)
