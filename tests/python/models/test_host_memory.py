"""Page-locked memory of a runtime comes back, whatever ends its use; a device that only keeps the books stands in."""

from __future__ import annotations

import gc
import warnings
from types import SimpleNamespace

import pytest
import torch
from icecache import IceRuntime, PoolExhaustedError, _core
from icecache.attention import DeviceSearch, StepShape
from icecache.errors import SearchMemoryError
from icecache.pages import Stores, store, warn_if_pageable
from tiny import build, prompt

POOL = _core.Pool(1)


def forward(model, ids, cache):
    with torch.no_grad():
        return model(ids, past_key_values=cache, use_cache=True).logits


def wrap(model, **options) -> tuple[IceRuntime, _core.HostMemory]:
    memory = _core.HostMemory(POOL, pin="simulated", **options)
    runtime = IceRuntime.wrap(model, dense_below=0)
    runtime._services.stores = Stores(None, POOL, memory)
    return runtime, memory


def held(memory: _core.HostMemory) -> int:
    gc.collect()
    assert memory.pinned_bytes() == memory.reserved_bytes()
    return memory.pinned_bytes()


def test_deleting_the_last_cache_and_the_runtime_frees_everything():
    model = build("llama")
    runtime, memory = wrap(model)
    caches = [runtime.new_cache() for _ in range(2)]
    for cache in caches:
        forward(model, prompt(1, 300), cache)
    del cache
    assert held(memory) > 0
    runtime.unwrap()
    caches.clear()
    del runtime
    assert held(memory) == 0


def test_an_exception_in_a_forward_leaks_nothing():
    model = build("llama")
    runtime, memory = wrap(model)
    handle = model.model.layers[-1].register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        forward(model, prompt(1, 300), runtime.new_cache())
    handle.remove()
    assert held(memory) > 0, "the store keeps its slabs for the next sequence"
    runtime.unwrap()
    del runtime
    assert held(memory) == 0


def test_memory_that_cannot_be_had_is_an_error_with_the_bytes_and_the_cache_stays_empty():
    model = build("llama")
    runtime, memory = wrap(model, limit_bytes=1 << 20)
    with runtime:
        cache = runtime.new_cache()
        with pytest.raises(PoolExhaustedError, match=r"\d+ bytes needed, 1048576 available"):
            forward(model, prompt(1, 300), cache)
        assert cache.get_seq_length() == 0
    del runtime, cache
    assert held(memory) == 0


def test_pageable_memory_in_the_place_of_page_locked_one_warns_and_works():
    model = build("llama")
    runtime, memory = wrap(model, simulated_limit=1)
    with runtime:
        cache, ids = runtime.new_cache(), prompt(1, 300)
        got = forward(model, ids, cache)
    with pytest.warns(RuntimeWarning, match="simulated limit of 1 bytes"):
        warn_if_pageable(memory)
    assert not memory.is_pinned()
    assert torch.isfinite(got).all()


@pytest.mark.parametrize("reuse", [1, 3])
def test_a_prompt_finds_its_memory_reserved_with_room_for_the_first_inserts(monkeypatch, reuse):
    model, asked = build("llama"), []
    begin = Stores.start_reserving

    def start_reserving(stores, store, n_bytes):
        asked.append((store.used_bytes(), n_bytes))
        begin(stores, store, n_bytes)

    monkeypatch.setattr(Stores, "start_reserving", start_reserving)
    memory = _core.HostMemory(POOL, pin="simulated")
    with IceRuntime.wrap(model, dense_below=0, budget=64, reuse=reuse) as runtime:
        stores = runtime._services.stores = Stores(None, POOL, memory)
        caches = [runtime.new_cache() for _ in range(2)]
        forward(model, prompt(2, 1500), caches[0])
        ((used, n_bytes),) = asked
        written = stores.used_bytes()
        assert used == 0
        assert written <= n_bytes <= 1.5 * written
        reserved = memory.reserved_bytes()
        assert reserved >= n_bytes
        for _ in range(3):
            forward(model, prompt(2, 16), caches[0])
        assert memory.reserved_bytes() == reserved
        assert len(asked) == 1
        forward(model, prompt(1, 300), caches[1])
        assert len(asked) == 2


class Shrinking:
    """A store in which a dropped sequence is freed while memory is reserved, and the new one is written."""

    def __init__(self, used, frees_after, writes):
        self.used, self.reserved, self.free_at, self.writes, self.n = used, used, frees_after, writes, 0

    def used_bytes(self):
        return self.used

    def reserve(self, n_bytes):
        self.reserved = max(self.reserved, self.used + n_bytes)
        self.n += 1
        if self.n == self.free_at:
            self.used = 0
        self.used += self.writes


@pytest.mark.parametrize("writes", [0, 100 << 20])
@pytest.mark.parametrize("frees_after", [1, 2, None])
def test_memory_of_a_sequence_that_is_just_being_freed_is_not_reserved_again(frees_after, writes):
    wanted, before = 4 << 30, 4 << 30
    fake = Shrinking(before, frees_after, writes)
    store._reserve(fake, wanted)
    expected = before + wanted if frees_after is None else wanted
    assert expected <= fake.reserved <= expected + (frees_after or 0) * (128 << 20)


def test_memory_that_cannot_be_reserved_ahead_is_no_error_by_itself():
    model = build("llama")
    runtime, memory = wrap(model, simulated_limit=1)
    with runtime:
        runtime._services.stores.limit_bytes = 1 << 20
        with pytest.raises(PoolExhaustedError, match="needed"):
            forward(model, prompt(1, 3000), runtime.new_cache())
        cache = runtime.new_cache()
        forward(model, prompt(1, 300), cache)
        assert cache.get_seq_length() == 300
    del runtime, cache
    assert memory.pinned_bytes() == 0


def test_a_source_that_works_does_not_warn():
    memory = _core.HostMemory(POOL, pin="simulated")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn_if_pageable(memory)


def test_reserving_ahead_spares_the_insert_an_allocation():
    memory = _core.HostMemory(POOL, pin="simulated")
    stores = Stores(None, POOL, memory)
    store = stores.get(16, 16, torch.float32)
    stores.reserve(40 << 20)
    reserved = memory.reserved_bytes()
    assert reserved >= 40 << 20
    assert store.used_bytes() == 0
    assert store.reserved_bytes() == reserved


def test_what_is_lent_leaves_less_for_pages_until_it_goes():
    memory = _core.HostMemory(POOL, pin="simulated")
    stores = Stores(8 << 20, POOL, memory)
    many = torch.zeros(1, 1 << 15, 64, dtype=torch.uint8).numpy()  # 2 MiB of keys, as much of values

    def fill():
        forest = _core.Forest(stores.get(16, 16, torch.float32), 1)
        _core.extend(POOL, [forest], [many], [many])
        return forest

    first = fill()
    first_bytes = stores.used_bytes()
    lent = torch.from_numpy(stores.lend(2 << 20))[:100]
    available = (6 << 20) - first_bytes
    with pytest.raises(MemoryError, match=f"4194304 bytes needed, {available} available"):
        stores.lend(4 << 20)
    with pytest.raises(MemoryError, match="page store is full"):
        fill()
    del lent
    assert len(fill()) == len(first)


def test_second_bits_that_host_memory_has_no_room_for_are_said_to_be_so():
    memory = _core.HostMemory(POOL, pin="simulated")
    stores = Stores(1 << 20, POOL, memory)
    stores.get(16, 16, torch.float32)
    shape = StepShape(1, 1, 2, 4, 16, 16, 6, 65, torch.float32, torch.device("cpu"))
    step = SimpleNamespace(shape=shape, finder=None, epoch=0)
    search = DeviceSearch(SimpleNamespace(stores=stores), bits=1)
    search._grow(step, 1000, 1)
    assert step.finder.codes.fine.data_ptr() != 0
    with pytest.raises(SearchMemoryError, match=r"host_memory pays for: page store is full.*search_bits=2") as caught:
        search._grow(step, 20_000, 1)
    assert caught.value.needed_bytes > 1 << 20
    assert held(memory) < 1 << 20, "what was lent before is back"
