"""Page-locked memory on a real device: bounded by its limit, and given back whatever ends its use."""

from __future__ import annotations

import gc

import pytest
import torch
from icecache import IceRuntime, PoolExhaustedError, _core
from icecache.pages import Stores
from tiny import build, prompt

pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda")
POOL = _core.Pool(2)


class Stop:
    """A logits processor that raises at its fifth token."""

    n = 0

    def __call__(self, _ids, scores):
        self.n += 1
        if self.n == 5:
            raise KeyboardInterrupt
        return scores


def wrap(model, **options):
    """A runtime whose pages and mailboxes lie in memory that the test can ask."""
    memory = _core.HostMemory(POOL, pin="always", device=torch.cuda.current_device(), **options)
    runtime = IceRuntime.wrap(model, dense_below=0, budget=64)
    runtime._services.stores = Stores(None, POOL, memory)
    return runtime, memory


def generate(model, n_new=40, **options):
    ids = prompt(1, 200).to(DEVICE)
    return model.generate(ids, max_new_tokens=n_new, do_sample=False, **options)


def held(memory):
    gc.collect()
    assert memory.pinned_bytes() == memory.reserved_bytes()
    return memory.pinned_bytes()


def steps_were_captured(runtime):
    return bool(runtime._hooks.decoder._captured)


@pytest.mark.parametrize("ends", ["returns", "raises", "is kept"])
def test_memory_is_free_once_runtime_and_caches_are_gone(ends):
    runtime, memory = wrap(build("llama").to(DEVICE))
    cache = runtime.new_cache()
    if ends == "raises":
        with pytest.raises(KeyboardInterrupt):
            generate(runtime.model, past_key_values=cache, logits_processor=[Stop()])
    else:
        generate(runtime.model, past_key_values=cache)
    assert steps_were_captured(runtime)
    assert held(memory) > 0
    runtime.unwrap()
    del runtime
    if ends == "is kept":
        assert cache.get_seq_length() > 200
        assert held(memory) > 0, "a cache that lives keeps its pages"
    del cache
    assert held(memory) == 0


def test_pages_of_a_dropped_cache_are_used_again():
    runtime, memory = wrap(build("llama").to(DEVICE))
    with runtime:
        generate(runtime.model)
        runtime.stats()
        gc.collect()
        before = held(memory)
        for _ in range(5):
            generate(runtime.model)
        assert held(memory) == before
        runtime.stats()  # the last step is over
        runtime._services.inserter.close()
        gc.collect()
        assert runtime._services.stores.used_bytes() == 0
    del runtime
    assert held(memory) == 0


def test_a_prompt_beyond_the_limit_is_an_error_with_the_bytes_and_the_runtime_goes_on():
    runtime, memory = wrap(build("llama").to(DEVICE), limit_bytes=1 << 20)
    with runtime:
        cache = runtime.new_cache()
        with pytest.raises(PoolExhaustedError, match=r"\d+ bytes needed, \d+ available"):
            generate(runtime.model, past_key_values=cache)
        assert cache.get_seq_length() == 0
    del runtime, cache
    assert held(memory) == 0


def test_an_insert_beyond_the_limit_fails_its_step_only_and_room_lets_the_sequence_go_on():
    model, ids = build("llama").to(DEVICE), prompt(1, 900).to(DEVICE)

    def two_prompts(runtime):
        caches = [runtime.new_cache() for _ in range(2)]
        for cache, n in zip(caches, (200, 900), strict=True):
            model(ids[:, :n], past_key_values=cache)
        return caches

    with IceRuntime.wrap(model, dense_below=0, budget=64) as probe, torch.no_grad():
        both = two_prompts(probe)
        used = probe.stats().host_bytes
        del both
    with IceRuntime.wrap(model, dense_below=0, budget=64, host_memory=used) as runtime, torch.no_grad():
        first, second = two_prompts(runtime)
        for t in range(200, 216):
            model(ids[:, t : t + 1], past_key_values=first)
        assert steps_were_captured(runtime)
        with pytest.raises(PoolExhaustedError, match="bytes needed"):
            model(ids[:, 216:217], past_key_values=first)
        assert first.get_seq_length() == 216
        del second
        gc.collect()
        for t in range(216, 260):
            model(ids[:, t : t + 1], past_key_values=first)
        assert first.get_seq_length() == 260
        runtime.stats()
