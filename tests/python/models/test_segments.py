"""Captured steps, on a CPU by a simulated graph, and modules that wait for the device, between the pieces of one."""

from __future__ import annotations

import copy

import pytest
import simulated_graph
import torch
from icecache import IceRuntime
from icecache.hf.segments import CudaRecorder, Watch
from simulated_graph import TapeRecorder
from test_graph_steps import with_device_steps
from tiny import build, prompt

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
RECORDER = CudaRecorder if GPU else TapeRecorder
SMALL = {"dense_below": 0, "threads": 1, "budget": 64, "decode": "eager"}


def steps(runtime, ids, first, stop):
    """Logits of tokens first .. stop, one by one, behind a prompt."""
    cache = runtime.new_cache()
    with torch.no_grad():
        runtime.model(ids[:, :first], past_key_values=cache)
        out = [runtime.model(ids[:, t : t + 1], past_key_values=cache).logits[:, -1] for t in range(first, stop)]
    runtime.stats()
    return torch.cat(out)


def close(a, b):
    return (a - b).abs().max() <= 1e-4 * a.abs().max()


def both(model, first=70, stop=72, attempts=1, **settings):
    """Logits of eager steps and of recorded ones, and the pieces of the recorded step, at its last attempt."""
    ids, made = prompt(1, stop).to(DEVICE), []

    def recorder():
        made.append(Counting())
        return made[-1]

    class Counting(RECORDER):
        n = 0

        def begin(self):
            self.n += 1
            super().begin()

    # Another model: older versions keep the frequencies of the longest sequence that a rotary embedding has seen.
    with IceRuntime.wrap(copy.deepcopy(model), **SMALL, **settings) as runtime:
        eager = steps(runtime, ids, first, stop)
    with IceRuntime.wrap(model, **SMALL, **settings) as runtime:
        search = with_device_steps(runtime, recorder)
        ours = steps(runtime, ids, first, stop)
        assert search.steps == stop - first
        assert runtime._hooks.decoder.refused is None
    assert len(made) == attempts
    return eager, ours, made[-1].n


def dynamic_rope():
    """A model whose frequencies change once a sequence is longer than 71 tokens; they are found on the host."""
    model = build("llama")
    config = model.config
    config.max_position_embeddings = 71
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.to(DEVICE)


def test_a_recorded_step_repeats_with_new_tokens():
    eager, ours, n_pieces = both(build("llama").to(DEVICE), dense_layers=(1,))
    assert n_pieces == 1
    assert close(eager, ours)


def test_frequencies_that_depend_on_the_position_are_computed_between_two_pieces():
    model = dynamic_rope()
    eager, ours, n_pieces = both(model)
    assert n_pieces == 2
    assert close(eager, ours)
    assert "forward" not in model.model.rotary_emb.__dict__
    with IceRuntime.wrap(build("llama").to(DEVICE), **SMALL) as runtime:  # frozen frequencies would have been seen
        assert not close(eager, steps(runtime, prompt(1, 72).to(DEVICE), 70, 72))


class Waiting(torch.nn.Module):
    """Wraps a module and looks at its input."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, hidden, *args, **kwargs):
        assert hidden.sum().item() != 0.125
        return self.inner(hidden, *args, **kwargs)


def test_waiting_modules_in_every_layer_run_between_pieces():
    """What such a module is given is computed by the piece before it, as experts that are chosen on the host are."""
    model = build("llama").to(DEVICE)
    for layer in model.model.layers:
        layer.mlp = Waiting(layer.mlp)
    eager, ours, n_pieces = both(model)
    assert n_pieces == 4
    assert close(eager, ours)


def test_modules_whose_waiting_is_hidden_in_an_operation_are_found_when_the_recording_fails(monkeypatch):
    class Hiding(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, hidden):
            return self.inner(hidden + 0.0 * _hidden_wait(hidden))

    model = build("llama").to(DEVICE)
    for layer in model.model.layers:
        layer.mlp = Hiding(layer.mlp)
    monkeypatch.setattr(simulated_graph, "FORBIDDEN", ("icetest::hidden_wait",))
    eager, ours, n_pieces = both(model, attempts=2)
    assert n_pieces == 4
    assert close(eager, ours)


@torch.library.custom_op("icetest::hidden_wait", mutates_args=())
def _hidden_wait(x: torch.Tensor) -> torch.Tensor:
    return torch.full_like(x, x.sum().item())


def test_a_module_that_waits_around_attention_is_refused_with_its_name():
    model, ids = build("llama").to(DEVICE), prompt(1, 72).to(DEVICE)
    for layer in model.model.layers:
        layer.self_attn.forward = _looking(layer.self_attn.forward)
    with IceRuntime.wrap(model, **SMALL) as runtime:
        eager = steps(runtime, ids, 70, 72)
        search = with_device_steps(runtime, RECORDER)
        with pytest.warns(UserWarning, match="op by op.*LlamaAttention attends, and waits for the device") as caught:
            ours = steps(runtime, ids, 70, 72)
        assert len([w for w in caught if "op by op" in str(w.message)]) == 1
        assert search.steps == 0
    assert torch.equal(eager, ours)


def _looking(forward):
    def look(self, *args, **kwargs):
        assert kwargs["hidden_states"].sum().item() != 0.125
        return forward(*args, **kwargs)

    return look.__get__(forward.__self__)


def test_a_module_whose_result_changes_its_shape_gives_the_graph_up_and_the_step_is_right():
    class Growing(Waiting):
        n = 0

        def forward(self, *args, **kwargs):
            Growing.n += 1
            cos, sin = super().forward(*args, **kwargs)
            return (cos.repeat(2, 1, 1), sin.repeat(2, 1, 1)) if Growing.n == 5 else (cos, sin)

    model, ids = build("llama").to(DEVICE), prompt(1, 73).to(DEVICE)
    with IceRuntime.wrap(model, **SMALL) as runtime:
        eager = steps(runtime, ids, 70, 73)
        model.model.rotary_emb = Growing(model.model.rotary_emb)
        with_device_steps(runtime, RECORDER)
        # One prompt, two rehearsals and the first step; at the second one it grows.
        with pytest.warns(UserWarning, match="returns something else at each step"):
            ours = steps(runtime, ids, 70, 73)
    assert close(eager, ours)


def test_operations_that_wait_are_told_from_those_that_do_not():
    x = torch.arange(6.0, device=DEVICE)
    quiet = [
        lambda: x[torch.tensor([1, 2], device=DEVICE)],
        lambda: x + 1,
        lambda: x.clone().copy_(x),
        lambda: x.double(),
    ]
    loud = [lambda: x.sum().item(), lambda: x.nonzero(), lambda: x[x > 1], lambda: bool((x > 1).all())]

    class Host(torch.nn.Module):
        def forward(self, operation):
            return operation()

    for operation in quiet + loud:
        host = Host()
        with Watch() as watch:
            host(operation)
        assert (host in watch.waiting) == (operation in loud)


@pytest.mark.gpu
def test_moves_between_host_and_device_wait():
    class Host(torch.nn.Module):
        def forward(self, operation):
            return operation()

    x, pinned, host = torch.ones(3, device=DEVICE), torch.ones(3).pin_memory(), Host()
    with Watch() as watch:
        host(lambda: pinned.to(DEVICE, non_blocking=True))
    assert not watch.waiting
    for operation in (x.cpu, lambda: pinned.to(DEVICE), lambda: pinned.copy_(x)):
        with Watch() as watch:
            host(operation)
        assert host in watch.waiting
