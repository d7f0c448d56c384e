"""Steps of a simulated device through the engine, against ordinary searches.

Dimension key: L layers, R rows, H KV heads, G query heads per KV head, D head dim, C capacity.
"""

from __future__ import annotations

import gc
import threading
import time

import numpy as np
import pytest
import torch
from forest_tools import ITEM_BYTES, flip, random_rows
from icecache import _core
from icecache.errors import BadTensorError, EngineError
from icecache.transfer import MailboxShape, open_mailbox
from simulated_device import SimulatedDevice, read_pages

L, R, H, G, D, C, K = 3, 2, 2, 3, 16, 12, 5
TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Setup:
    """Forests of all layers and rows, a mailbox, and a device."""

    def __init__(self, dtype: str = "float32", n_tokens: int = 1500, workers: int = 2, wait_s: float = 30.0, **options):
        self.pool = _core.Pool(1)
        self.memory = _core.HostMemory(self.pool, pin="simulated")
        self.store = _core.PageStore(D, D, dtype, memory=self.memory, slab_bytes=1 << 16)
        self.dtype, self.row_bytes = dtype, D * ITEM_BYTES[dtype]
        self.forests = [[_core.Forest(self.store, H) for _ in range(R)] for _ in range(L)]
        for layer, forests in enumerate(self.forests):
            rows = [random_rows(10 * layer + r, H, n_tokens + 700 * r, D, dtype) for r in range(R)]
            _core.extend(self.pool, forests, rows, [flip(keys) for keys in rows])
        self.engine = _core.Engine(workers, **options)
        self.shape = MailboxShape(n_layers=L, n_rows=R, n_kv_heads=H, group=G, key_dim=D, capacity=C, dtype=dtype)
        self.mailbox, self.tensors = open_mailbox(self.engine, self.memory, self.shape)
        self.device = SimulatedDevice(self.tensors, wait_s)
        self.bind()

    def bind(self) -> None:
        for layer, forests in enumerate(self.forests):
            self.mailbox.bind(layer, forests, K, scaling=0.25)

    def queries(self, seed: int) -> list[torch.Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(R, H, G, D, generator=generator).to(TORCH[self.dtype]) for _ in range(L)]

    def step(self, seed: int, *, refresh: bool = False) -> list[torch.Tensor]:
        queries = self.queries(seed)
        self.device.launch(self.mailbox.begin_step(refresh=refresh), queries)
        self.device.synchronize()
        self.mailbox.end_step()
        return queries

    def answer(self, layer: int, row: int, head: int) -> list[tuple[bytes, bytes]]:
        return read_pages(self.device.tables[layer][row, head], self.row_bytes, self.row_bytes)

    def search(self, layer: int, queries: torch.Tensor) -> _core.Selection:
        numbers = queries.float().numpy()
        return _core.search(self.pool, self.forests[layer], numbers, K, scaling=0.25)

    def expected(self, selection: _core.Selection, row: int, head: int) -> list[tuple[bytes, bytes]]:
        shape = (R, H, selection.pages.shape[2], 16, self.row_bytes)
        keys, values = np.empty(shape, np.uint8), np.empty(shape, np.uint8)
        selection.gather(self.pool, 0, shape[2], keys, values)
        counts = selection.counts[row, head]
        return [
            (keys[row, head, page, slot].tobytes(), values[row, head, page, slot].tobytes())
            for page, count in enumerate(counts)
            for slot in range(count)
        ]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_device_reads_the_pages_that_an_ordinary_search_chooses(dtype):
    setup = Setup(dtype)
    for seed in range(3):
        queries = setup.step(seed)
        for layer in range(L):
            selection = setup.search(layer, queries[layer])
            np.testing.assert_array_equal(setup.tensors.lse[layer].numpy(), selection.lse)
            for row in range(R):
                for head in range(H):
                    rows = setup.answer(layer, row, head)
                    assert rows == setup.expected(selection, row, head)
                    assert rows


def test_inserts_become_visible_at_the_refresh_and_not_before():
    setup = Setup(n_tokens=1020)
    setup.step(0)
    lengths = [[len(f) for f in forests] for forests in setup.forests]
    for batch in range(4):
        flat = [forest for forests in setup.forests for forest in forests]
        keys = [random_rows(100 * batch + i, H, 16, D, "float32") for i in range(len(flat))]
        before = [setup.search(layer, q) for layer, q in enumerate(setup.queries(batch))]
        inserting = threading.Thread(target=_core.extend, args=(setup.pool, flat, keys, [flip(k) for k in keys]))
        inserting.start()
        setup.step(batch)  # seals and splits happen during this step
        inserting.join()
        for layer in range(L):
            assert setup.answer(layer, 0, 1) == setup.expected(before[layer], 0, 1)
        queries = setup.step(batch, refresh=True)
        for layer in range(L):
            assert [len(f) for f in setup.forests[layer]] == [n + 16 * (batch + 1) for n in lengths[layer]]
            assert setup.answer(layer, 1, 0) == setup.expected(setup.search(layer, queries[layer]), 1, 0)
    for forests in setup.forests:
        for forest in forests:
            forest.validate()


def test_a_row_that_fits_the_budget_is_answered_with_all_its_pages():
    setup = Setup(n_tokens=1)
    for forests in setup.forests:  # 60 tokens one by one: pages of the tail are half full
        for seed in range(59):
            keys = random_rows(1000 + seed, H, 1, D, "float32")
            _core.extend(setup.pool, forests[:1], [keys], [flip(keys)])
    setup.step(0, refresh=True)
    for layer in range(L):
        rows = setup.answer(layer, 0, 1)
        everything = _core.all_pages(setup.forests[layer][:1])
        assert len(rows) == 60
        assert len(set(rows)) == everything.counts[0, 1].sum()


def test_a_panic_of_a_worker_is_an_error_and_the_next_step_works():
    setup = Setup()
    setup.step(0)
    kept = setup.answer(1, 0, 0)
    setup.mailbox._fault((1, 0))
    with pytest.raises(EngineError, match="panicked at layer 1, row 0, KV head 0"):
        setup.step(1)
    assert setup.answer(1, 0, 0) == kept, "the unit keeps the pages of the step before"
    setup.mailbox._fault(None)
    queries = setup.step(2)
    assert setup.answer(1, 0, 0) == setup.expected(setup.search(1, queries[1]), 0, 0)


def test_a_stalled_worker_is_an_overrun_then_an_error_until_it_is_back():
    setup = Setup(patience_ms=200)
    setup.step(0)
    setup.mailbox._fault((1, 2), stall_ms=1500)
    setup.device.wait_s = 0.05
    setup.device.launch(setup.mailbox.begin_step(), setup.queries(1)[:2])
    setup.device.synchronize()
    with pytest.raises(EngineError, match="still busy"):
        setup.mailbox.end_step()
    setup.mailbox._fault(None)
    with pytest.raises(EngineError, match="stuck"):
        setup.mailbox.begin_step()
    deadline = time.monotonic() + 30
    while True:
        try:
            ticket = setup.mailbox.begin_step()
            break
        except EngineError:
            assert time.monotonic() < deadline
            time.sleep(0.01)
    setup.device.wait_s = 30.0
    queries = setup.queries(2)
    setup.device.launch(ticket, queries)
    setup.device.synchronize()
    setup.mailbox.end_step()
    assert setup.answer(1, 1, 0) == setup.expected(setup.search(1, queries[1]), 1, 0)


def test_a_query_that_is_not_finite_names_its_place():
    setup = Setup()
    queries = setup.queries(0)
    queries[2][1, 0, 2, 5] = float("inf")
    setup.device.launch(setup.mailbox.begin_step(), queries)
    setup.device.synchronize()
    with pytest.raises(BadTensorError, match="layer 2, row 1, KV head 0"):
        setup.mailbox.end_step()
    setup.step(1)


def test_a_device_that_stops_waiting_raises_an_overrun():
    setup = Setup()
    setup.step(0)
    ticket = setup.mailbox.begin_step()
    setup.device.wait_s = 0.0
    setup.device.launch(ticket, setup.queries(1))
    setup.device.synchronize()
    if not bool((setup.tensors.timeout == ticket).any()):
        setup.tensors.timeout[1] = ticket  # the workers were faster than no wait at all
    with pytest.raises(EngineError, match="stopped waiting"):
        setup.mailbox.end_step()
    setup.device.wait_s = 30.0
    queries = setup.step(2)
    assert setup.answer(0, 0, 0) == setup.expected(setup.search(0, queries[0]), 0, 0)


def test_a_step_that_never_asks_is_an_error_and_abort_needs_none():
    setup = Setup()
    setup.mailbox.begin_step()
    with pytest.raises(EngineError, match="posted no queries for layer 0"):
        setup.mailbox.end_step()
    setup.mailbox.begin_step()
    with pytest.raises(EngineError, match="in flight"):
        setup.mailbox.begin_step()
    setup.mailbox.abort()
    setup.step(1)


def test_everything_can_be_dropped_while_a_step_is_in_flight():
    setup = Setup()
    memory, forest = setup.memory, setup.forests[0][0]
    view = setup.tensors.request
    setup.mailbox.begin_step()
    del setup
    gc.collect()
    assert memory.pinned_bytes() > 0, "the tensor keeps the mailbox alive"
    del view, forest
    gc.collect()
    assert memory.pinned_bytes() == memory.reserved_bytes() == 0


def test_two_engines_serve_two_models_at_the_same_time():
    setups = [Setup(workers=1), Setup(workers=2)]
    for seed in range(5):
        queries = [setup.queries(seed + i) for i, setup in enumerate(setups)]
        for setup, posted in zip(setups, queries, strict=True):
            setup.device.launch(setup.mailbox.begin_step(), posted)
        for setup, posted in zip(setups, queries, strict=True):
            setup.device.synchronize()
            setup.mailbox.end_step()
            assert setup.answer(0, 1, 1) == setup.expected(setup.search(0, posted[0]), 1, 1)


def test_two_mailboxes_of_an_engine_take_turns():
    setup = Setup()
    other, tensors = open_mailbox(setup.engine, setup.memory, setup.shape)
    for layer, forests in enumerate(setup.forests):
        other.bind(layer, forests[:1], K, scaling=0.25)
    setup.mailbox.begin_step()
    with pytest.raises(EngineError, match="in flight"):
        other.begin_step()
    setup.mailbox.abort()
    device, queries = SimulatedDevice(tensors), setup.queries(3)
    device.launch(other.begin_step(), [q[:1] for q in queries])
    device.synchronize()
    other.end_step()
    rows = read_pages(device.tables[2][0, 1], setup.row_bytes, setup.row_bytes)
    selection = _core.search(setup.pool, setup.forests[2][:1], queries[2][:1].numpy(), K, scaling=0.25)
    assert len(rows) == int(selection.counts[0, 1].sum())


def test_times_are_those_of_the_step():
    setup = Setup()
    setup.step(0)
    times = setup.mailbox.times()
    seen, answered, longest = times.T
    assert (seen > 0).all()
    assert (answered > seen).all()
    assert (seen[1:] >= answered[:-1]).all()
    assert (longest > 0).all()


def test_arguments_that_do_not_fit_change_nothing():
    setup = Setup()
    mailbox, forest = setup.mailbox, setup.forests[0][0]
    wrong_heads = _core.Forest(setup.store, H + 1)
    wrong_dim = _core.Forest(_core.PageStore(D + 1, D, "float32"), H)
    for arguments in [(L, [forest], K), (0, [], K), (0, [forest] * (R + 1), K), (0, [forest], C + 1), (0, [forest], 0)]:
        with pytest.raises(ValueError, match="expected"):
            mailbox.bind(*arguments, scaling=1.0)
    for bad in (wrong_heads, wrong_dim):
        with pytest.raises(ValueError, match="expected"):
            mailbox.bind(0, [bad], K, scaling=1.0)
    with pytest.raises(ValueError, match="workers"):
        _core.Engine(257)
    with pytest.raises(ValueError, match="n_layers"):
        open_mailbox(setup.engine, setup.memory, MailboxShape(**{**_fields(setup.shape), "n_layers": 0}))
    setup.step(0)


def _fields(shape: MailboxShape) -> dict[str, object]:
    return {name: getattr(shape, name) for name in MailboxShape.__dataclass_fields__}
