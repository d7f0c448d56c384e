"""Decode steps on static buffers, with a thread that answers the mailbox from the real index.

On a CPU the kernels run in Triton's interpreter and nothing is captured; on a GPU each step is a CUDA graph.
"""

from __future__ import annotations

import gc

import pytest
import torch
from icecache import EngineError, IceRuntime, _core
from icecache.attention import EngineSearch
from icecache.hf.graph import GraphDecoder
from icecache.hf.segments import CudaRecorder
from icecache.pages import as_bytes
from tiny import build, left_padded, prompt, recurrent
from transformers import cache_utils

GPU = torch.cuda.is_available()
N_NEW = 12 if GPU else 4  # the interpreter takes about a second a step
DEVICE = "cuda" if GPU else "cpu"
SMALL = {"dense_below": 0, "threads": 1, "budget": 64, "decode": "eager"}


class CountingSearch(EngineSearch):
    """The engine's search, which also counts its steps."""

    steps = 0

    def begin(self, *arguments):
        self.steps += 1
        return super().begin(*arguments)


def with_device_steps(runtime, recorder=CudaRecorder if GPU else None):
    """Let a runtime decode on static buffers; returns the search."""
    workers = None if GPU else 1
    search = CountingSearch(lambda: _core.Engine(workers, pin_threads=GPU), runtime._services)
    runtime._hooks.decode_with(GraphDecoder(runtime.model, runtime._engine, search, recorder=recorder))
    return search


def generate(model, inputs, n_new=N_NEW, **options):
    inputs = {name: x.to(DEVICE) for name, x in inputs.items()}
    options = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, **options}
    out = model.generate(**inputs, max_new_tokens=n_new, **options)
    return out.sequences, torch.stack(out.logits)


def both_ways(family, inputs, *, dense_below=0, **settings):
    """Tokens and logits of eager steps and of device steps of the same runtime settings."""
    use = settings.pop("use", generate)
    model, results = build(family).to(DEVICE), []
    for device_steps in (False, True):
        options = {"dense_below": dense_below, "threads": 1, "decode": "eager", **settings}
        with IceRuntime.wrap(model, **options) as runtime:
            search = with_device_steps(runtime) if device_steps else None
            results.append(use(model, inputs))
    assert search.steps > 0
    return results, search


@pytest.mark.parametrize("family", ["llama", *(pytest.param(f, marks=pytest.mark.gpu) for f in ("qwen3", "phi3"))])
def test_device_steps_give_the_logits_of_eager_steps_under_a_small_budget(family):
    (eager, ours), search = both_ways(family, {"input_ids": prompt(1, 150)}, budget=80)
    assert search.steps == N_NEW - 1
    assert torch.equal(eager[0], ours[0])
    assert (eager[1] - ours[1]).abs().max() <= 1e-4 * eager[1].abs().max()


@pytest.mark.gpu
def test_tokens_that_leave_the_window_are_found_in_pages():
    """30 steps: two batches of 16 tokens are inserted on the way."""
    use = lambda model, inputs: generate(model, inputs, n_new=36)  # noqa: E731
    (eager, ours), _ = both_ways("llama", {"input_ids": prompt(1, 120)}, budget=64, use=use)
    assert torch.equal(eager[0], ours[0])


@pytest.mark.gpu
def test_late_inserts_change_no_token(late):
    use = lambda model, inputs: generate(model, inputs, n_new=60)  # noqa: E731
    (eager, ours), _ = both_ways("llama", {"input_ids": prompt(2, 120)}, budget=64, use=use)
    assert torch.equal(eager[0], ours[0])
    assert len(late) >= 3


def test_a_ragged_batch_is_one_step():
    (eager, ours), search = both_ways("llama", left_padded([150, 70, 101]), budget=64)
    assert search.steps > 0
    assert torch.equal(eager[0], ours[0])


@pytest.mark.gpu
def test_a_covering_budget_equals_dense_attention():
    inputs = {"input_ids": prompt(2, 90)}
    model = build("llama").to(DEVICE)
    dense = generate(model, inputs)
    (_, ours), _ = both_ways("llama", inputs, budget=48 + 160)
    assert torch.equal(dense[0], ours[0])
    assert (dense[1] - ours[1]).abs().max() <= 1e-4 * dense[1].abs().max()


@pytest.mark.gpu
def test_sampling_draws_what_eager_steps_draw():
    def use(model, inputs):
        torch.manual_seed(3)
        return generate(model, inputs, do_sample=True, temperature=0.8, top_p=0.9)

    (eager, ours), _ = both_ways("llama", {"input_ids": prompt(2, 100)}, budget=64, use=use)
    assert torch.equal(eager[0], ours[0])


@pytest.mark.gpu
def test_beams_that_swap_rows_are_followed():
    use = lambda model, inputs: generate(model, inputs, n_new=6, num_beams=2)  # noqa: E731
    (eager, ours), _ = both_ways("llama", {"input_ids": prompt(1, 100)}, budget=64, use=use)
    assert torch.equal(eager[0], ours[0])


@pytest.mark.parametrize("reuse", [2, pytest.param(3, marks=pytest.mark.gpu)])
def test_layers_that_share_pages_read_what_their_leader_is_told(reuse):
    """Three layers: one group of two and one of one, or one group."""
    inputs, model, results = left_padded([150, 70, 101]), build("llama").to(DEVICE), []
    for device_steps in (False, True):
        with IceRuntime.wrap(model, **SMALL, reuse=reuse) as runtime:
            search = with_device_steps(runtime) if device_steps else None
            out = generate(model, inputs, n_new=40 if GPU else N_NEW)
            stats = runtime.stats()
            results.append((out, [stats.pages_read, stats.attended_mean, stats.attended_max]))
            if search is not None:
                assert [len(box.tensors.table) for box in search._boxes.values()] == [len(range(0, 3, reuse))]
    assert search.steps > 0
    (eager, told), (ours, counted) = results
    assert torch.equal(eager[0], ours[0])
    assert (eager[1] - ours[1]).abs().max() <= 1e-4 * eager[1].abs().max()
    assert counted == told


@pytest.mark.gpu
@pytest.mark.parametrize("reuse", [2, 3])
def test_layers_that_share_pages_equal_dense_attention_and_a_cpu(reuse):
    inputs, tokens = {"input_ids": prompt(2, 150)}, {}
    dense = generate(build("llama").to(DEVICE), inputs)
    (_, ours), _ = both_ways("llama", inputs, budget=48 + 320, reuse=reuse)
    assert torch.equal(dense[0], ours[0])
    for device in ("cpu", "cuda"):
        model = build("llama").to(device)
        with IceRuntime.wrap(model, **{**SMALL, "decode": "auto"}, reuse=reuse):
            ids = {name: x.to(device) for name, x in inputs.items()}
            tokens[device] = model.generate(**ids, max_new_tokens=60, do_sample=False).cpu()
    assert torch.equal(tokens["cpu"], tokens["cuda"])


def test_two_sequences_take_turns_on_the_same_buffers():
    model, ids, more = build("llama").to(DEVICE), prompt(2, 120).to(DEVICE), prompt(2, N_NEW // 2, seed=1).to(DEVICE)

    def run(runtime):
        caches = [runtime.new_cache() for _ in range(2)]
        with torch.no_grad():
            for row, cache in enumerate(caches):
                model(ids[row : row + 1], past_key_values=cache)
            return torch.cat(
                [
                    model(more[row : row + 1, t : t + 1], past_key_values=caches[row]).logits
                    for t in range(N_NEW // 2)
                    for row in ((0, 1) if t % 2 else (1, 0))
                ]
            )

    with IceRuntime.wrap(model, **SMALL) as runtime:
        eager = run(runtime)
        search = with_device_steps(runtime)
        ours = run(runtime)
    assert search.steps == N_NEW
    assert (eager - ours).abs().max() <= 1e-4 * eager.abs().max()


def test_a_crop_and_a_chunk_between_steps_are_seen_by_the_next_step():
    model, ids = build("llama").to(DEVICE), prompt(1, 200).to(DEVICE)

    def run(runtime):
        cache, out = runtime.new_cache(), []
        with torch.no_grad():
            model(ids[:, :120], past_key_values=cache)
            for piece in (ids[:, 120:121], ids[:, 121:122], ids[:, 122:160], ids[:, 160:161], None, ids[:, 170:171]):
                if piece is None:
                    cache.crop(-30)
                    continue
                out += [model(piece, past_key_values=cache).logits[:, -1]]
        return torch.cat(out)

    with IceRuntime.wrap(model, **SMALL) as runtime:
        eager = run(runtime)
        search = with_device_steps(runtime)
        ours = run(runtime)
    assert search.steps == 4
    assert (eager - ours).abs().max() <= 1e-4 * eager.abs().max()


@pytest.mark.skipif(
    not hasattr(cache_utils, "LinearAttentionLayer"), reason="such models bring a cache of their own in older versions"
)
def test_a_layer_that_cannot_be_captured_means_eager_steps_and_one_warning():
    model = recurrent().to(DEVICE)
    inputs = {"input_ids": prompt(1, 100)}
    with IceRuntime.wrap(model, **SMALL) as runtime:
        eager = generate(model, inputs)
        search = with_device_steps(runtime)
        with pytest.warns(
            UserWarning, match="layer 0 keeps an ordinary cache of its own kind .LinearAttentionLayer."
        ) as caught:
            ours = generate(model, inputs)
        assert len([w for w in caught if "CUDA graph" in str(w.message)]) == 1
    assert search.steps == 0
    assert torch.equal(eager[0], ours[0])


def test_unwrap_takes_the_override_away():
    model = build("llama").to(DEVICE)
    with IceRuntime.wrap(model, **SMALL) as runtime:
        with_device_steps(runtime)
        assert "forward" in model.__dict__
        generate(model, {"input_ids": prompt(1, 100)}, n_new=3)
    assert "forward" not in model.__dict__


def test_a_search_that_fails_is_an_error_of_the_next_step_and_the_sequence_goes_on():
    model, ids = build("llama").to(DEVICE), prompt(1, 120).to(DEVICE)
    with IceRuntime.wrap(model, **SMALL) as runtime, torch.no_grad():
        search = with_device_steps(runtime)
        cache = runtime.new_cache()
        model(ids[:, :110], past_key_values=cache)
        model(ids[:, 110:111], past_key_values=cache)
        (held,) = search._boxes.values()
        held.box._fault((1, 0))
        model(ids[:, 111:112], past_key_values=cache)
        before = cache.get_seq_length()
        with pytest.raises(EngineError):
            model(ids[:, 112:113], past_key_values=cache)
        assert cache.get_seq_length() == before
        held.box._fault(None)
        model(ids[:, 112:113], past_key_values=cache)
        assert cache.get_seq_length() == before + 1
        assert all(layer.pages.handed[0] is not None for layer in cache.layers), "tokens are inserted beside the steps"


def test_a_dropped_cache_gives_its_pages_back():
    model, ids = build("llama").to(DEVICE), prompt(1, 120).to(DEVICE)
    with IceRuntime.wrap(model, **SMALL) as runtime, torch.no_grad():
        with_device_steps(runtime)
        cache = runtime.new_cache()
        model(ids[:, :110], past_key_values=cache)
        model(ids[:, 110:111], past_key_values=cache)
        assert runtime._services.stores.used_bytes() > 0
        runtime.stats()  # the step is over
        del cache
        runtime._services.inserter.close()  # what is under way keeps its pages
        gc.collect()
        assert runtime._services.stores.used_bytes() == 0


def test_what_was_read_is_counted():
    model = build("llama").to(DEVICE)
    with IceRuntime.wrap(model, **SMALL) as runtime:
        with_device_steps(runtime)
        generate(model, {"input_ids": prompt(2, 100)})
        stats = runtime.stats()
    assert stats.steps == N_NEW - 1
    assert 48 < stats.attended_min <= stats.attended_max <= 64 + 1 + 15
    assert stats.pages_read == (N_NEW - 1) * 2 * 3 * 2 * 2  # rows, layers, KV heads, pages
    assert stats.ms["search"] > 0


@pytest.mark.gpu
def test_two_thousand_steps_lose_no_token_and_store_what_eager_steps_store():
    """Inserts, splits and seals on the way; the forests of both ways hold the same keys and values in every place."""
    model, ids = build("llama").to(DEVICE), prompt(1, 2200).to(DEVICE)
    stored, logits = [], []
    for device_steps in (False, True):
        with IceRuntime.wrap(model, **SMALL) as runtime, torch.no_grad():
            search = with_device_steps(runtime) if device_steps else None
            cache = runtime.new_cache()
            model(ids[:, :200], past_key_values=cache)
            seen = [model(ids[:, t : t + 1], past_key_values=cache).logits[:, -1] for t in range(200, 2200)]
            logits.append(torch.cat(seen))
            forests = [layer.pages.forests[0] for layer in cache.layers]
            for forest in forests:
                forest.validate()
            stored.append([read_all(forest) for forest in forests])
    assert search.steps == 2000
    assert forests[0].counters()["segments"] > 0
    for eager, ours in zip(*stored, strict=True):
        for a, b in zip(eager, ours, strict=True):
            assert a.shape == b.shape
            assert a.shape[1] >= 2200 - 16 - 32 - 16
            assert ((a - b).abs() <= 1e-3 * a.abs().max()).float().mean() > 0.999
    # A search that is nearly undecided may choose another page for a last bit of difference.
    close = (logits[0] - logits[1]).abs().amax(-1) <= 1e-3 * logits[0].abs().max()
    assert close.float().mean() > 0.99


def read_all(forest):
    keys, values = torch.empty(2, len(forest), 16), torch.empty(2, len(forest), 16)
    forest.read(0, len(forest), as_bytes(keys), as_bytes(values))
    return keys, values


@pytest.mark.gpu
def test_a_worker_that_is_late_is_an_error_and_never_a_hang():
    model, ids = build("llama").to(DEVICE), prompt(1, 120).to(DEVICE)
    with IceRuntime.wrap(model, **SMALL) as runtime, torch.no_grad():
        search = with_device_steps(runtime)
        cache = runtime.new_cache()
        model(ids[:, :110], past_key_values=cache)
        model(ids[:, 110:111], past_key_values=cache)
        runtime.stats()
        (held,) = search._boxes.values()
        held.box._fault((1, 0), stall_ms=3000)
        model(ids[:, 111:112], past_key_values=cache)
        with pytest.raises(EngineError):
            runtime.stats()
        held.box._fault(None)
        model(ids[:, 112:113], past_key_values=cache)
        runtime.stats()


@pytest.mark.gpu
def test_two_models_in_one_process_do_not_disturb_each_other():
    models = [build("llama", seed).to(DEVICE) for seed in (0, 1)]
    inputs = {"input_ids": prompt(1, 120)}
    alone = []
    for model in models:
        with IceRuntime.wrap(model, **SMALL) as runtime:
            with_device_steps(runtime)
            alone.append(generate(model, inputs)[0])
    with IceRuntime.wrap(models[0], **SMALL) as first, IceRuntime.wrap(models[1], **SMALL) as second:
        with_device_steps(first), with_device_steps(second)
        for _ in range(2):
            assert all(torch.equal(generate(model, inputs)[0], a) for model, a in zip(models, alone, strict=True))


@pytest.mark.gpu
def test_an_interrupted_generate_leaves_a_usable_runtime():
    model, inputs = build("llama").to(DEVICE), {"input_ids": prompt(1, 120)}

    class Stop:
        n = 0

        def __call__(self, _ids, scores):
            self.n += 1
            if self.n == 5:
                raise KeyboardInterrupt
            return scores

    with IceRuntime.wrap(model, **SMALL) as runtime:
        with_device_steps(runtime)
        expected = generate(model, inputs)[0]
        with pytest.raises(KeyboardInterrupt):
            generate(model, inputs, logits_processor=[Stop()])
        gc.collect()
        assert torch.equal(generate(model, inputs)[0], expected)
        with pytest.raises(KeyboardInterrupt):
            generate(model, inputs, logits_processor=[Stop()])
    assert "forward" not in model.__dict__
