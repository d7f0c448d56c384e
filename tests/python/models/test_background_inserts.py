"""Tokens that are inserted beside the steps: what is attended never depends on it, and nothing is lost or seen twice.

The steps are eager here, with the hand-over that a graph step makes before each of them, so that both ways can be
compared bit for bit.
"""

from __future__ import annotations

import copy
import gc
import os
import random
import sys
import threading
from pathlib import Path

import pytest
import torch
from icecache import IceRuntime, PoolExhaustedError, _core
from icecache.config import PAGE_TOKENS
from icecache.errors import BadTensorError
from icecache.pages import ahead
from tiny import build, left_padded, prompt

SMALL = {"dense_below": 0, "threads": 1, "budget": 80, "decode": "eager"}
WINDOW = 32


class Steps:
    """One wrapped model whose steps hand tokens over, or do not."""

    def __init__(self, *, hands_over, **settings):
        self.model, self.hands_over = build("llama"), hands_over
        self.runtime = IceRuntime.wrap(self.model, **{**SMALL, **settings})
        self.cache = self.runtime.new_cache()

    def pages(self):
        return [layer.pages for layer in self.cache.layers if layer.pages is not None]

    def __call__(self, ids, **arguments):
        if self.hands_over and ids.shape[1] == 1:
            self.runtime._services.drain(self.pages())
            self.runtime._services.hand_over(self.pages())
        with torch.no_grad():
            logits = self.model(ids, past_key_values=self.cache, **arguments).logits
        self.check()
        if ids.shape[1] == 1:
            for pages in self.pages():
                longest = max(pages.near.window_count(b) for b in range(pages.n_rows))
                assert longest <= pages.layout.window_tokens + PAGE_TOKENS, "the window grows without bound"
        return logits

    def check(self):
        """Every token is in exactly one place."""
        for pages in self.pages():
            for b in range(pages.n_rows):
                assert pages.length(b) == int(pages.padding.valid()[b].sum())
                handed = pages.handed[b]
                assert handed is None or handed.n_tokens <= pages.near.window_count(b)

    def digests(self):
        self.runtime._services.drain(self.pages())
        return [forest.digest() for pages in self.pages() for forest in pages.forests]


def both(use, **settings):
    """What `use` returns without and with hand-over, and the second runtime's statistics."""
    results = []
    for hands_over in (False, True):
        steps = Steps(hands_over=hands_over, **settings)
        with steps.runtime as runtime:
            results.append((use(steps), steps.digests()))
            stats = runtime.stats()
    return *results, stats


def decode(steps, ids, first):
    return [steps(ids[:, :first]), *(steps(ids[:, t : t + 1]) for t in range(first, ids.shape[1]))]


def same(a, b):
    return a[1] == b[1] and all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True))


@pytest.mark.parametrize(("window", "reuse"), [(1, 1), (WINDOW, 1), (WINDOW, 3)])
def test_every_step_is_bit_for_bit_what_it_is_with_inserts_at_once(window, reuse):
    ids, near = prompt(2, 200), {"window_tokens": window, "budget": window + 16 + 32}
    at_once, beside, _ = both(lambda steps: decode(steps, ids, 150), **near, reuse=reuse)
    assert same(at_once, beside)


def test_a_late_insert_is_waited_for_and_changes_nothing(late):
    ids = prompt(1, 225)  # one more is under way at the end
    at_once, beside, stats = both(lambda steps: decode(steps, ids, 150))
    assert same(at_once, beside)
    assert len(late) == 4
    assert stats.ms["insert_wait"] > 0


def test_steps_that_wait_for_nothing_count_no_waiting(monkeypatch):
    ids = prompt(1, 230)
    submit = ahead.Inserter.submit

    def at_once(*arguments):
        job = submit(*arguments)
        job.result()
        return job

    monkeypatch.setattr(ahead.Inserter, "submit", at_once)
    assert both(lambda steps: decode(steps, ids, 150))[2].ms["insert_wait"] == 0


def test_a_ragged_batch_with_pads_between_is_the_same():
    inputs = left_padded([150, 70, 20])
    more = prompt(3, 60, seed=4)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(more)], 1)
    mask[1, 180:190] = 0

    def use(steps):
        steps(inputs["input_ids"], attention_mask=inputs["attention_mask"])
        return [steps(more[:, t : t + 1], attention_mask=mask[:, : 151 + t]) for t in range(60)]

    at_once, beside, _ = both(use)
    assert same(at_once, beside)


@pytest.mark.parametrize(("seed", "reuse"), [(0, 1), (1, 1), (1, 2)])
def test_crops_forks_swapped_rows_and_chunks_at_any_moment_change_nothing(seed, reuse):
    def use(steps):
        draw, ids = random.Random(seed), prompt(2, 400, seed)
        out, t, aside = [steps(ids[:, :150])], 150, None
        for _ in range(80):
            kind = draw.choices(["step", "crop", "fork", "swap", "repeat", "chunk"], [80, 4, 4, 4, 4, 4])[0]
            if kind == "crop":
                steps.cache.crop(-draw.choice([1, 5, 30, 60]))
            elif kind == "fork":  # go on with the copy, or with the one that was left behind
                aside, steps.cache = (steps.cache, copy.deepcopy(steps.cache)) if aside is None else (None, aside)
            elif kind == "swap":
                steps.cache.reorder_cache(torch.tensor([1, 0]))
            elif kind == "repeat":
                steps.cache.reorder_cache(torch.tensor([1, 1]))
            else:
                n = 1 if kind == "step" else draw.choice([2, 7, 40])
                out.append(steps(ids[:, t : t + n]))
                t += n
            steps.check()
        return out

    at_once, beside, _ = both(use, reuse=reuse)
    assert same(at_once, beside)


def test_a_copy_and_its_original_share_what_is_on_the_way(monkeypatch):
    ids, jobs = prompt(1, 200), []
    insert = ahead.insert
    monkeypatch.setattr(ahead, "insert", lambda *arguments: (jobs.append(1), insert(*arguments)))

    def use(steps):
        out = decode(steps, ids[:, :160], 150)
        first, steps.cache = steps.cache, copy.deepcopy(steps.cache)
        for cache in (steps.cache, first):
            steps.cache = cache
            out += [steps(ids[:, t : t + 1]) for t in range(160, 170)]
            if steps.hands_over:
                assert all(pages.handed[0] is not None for pages in steps.pages())
        return out

    at_once, beside, _ = both(use)
    assert same(at_once, beside)
    assert len(jobs) == 1 + 2, "one that was shared, then one of each"


@pytest.mark.parametrize("error", [PoolExhaustedError("full"), BadTensorError("bad")], ids=["full", "bad"])
def test_an_insert_that_fails_is_an_error_of_the_step_that_needs_it_and_nothing_is_lost(monkeypatch, error):
    ids = prompt(1, 220)
    steps = Steps(hands_over=True)
    insert, failures = ahead.insert, []

    def broken(*arguments):
        if not failures:
            failures.append(arguments)
            raise error
        insert(*arguments)

    monkeypatch.setattr(ahead, "insert", broken)
    due = 150 + PAGE_TOKENS
    with steps.runtime:
        out = decode(steps, ids[:, :due], 150)
        with pytest.raises(type(error)) as caught:
            steps(ids[:, due : due + 1])
        assert caught.value is error
        assert steps.cache.get_seq_length() == due
        steps.check()
        out += [steps(ids[:, t : t + 1]) for t in range(due, 220)]
        digests = steps.digests()
    plain = Steps(hands_over=False)
    with plain.runtime:
        assert same((decode(plain, ids, 150), plain.digests()), (out, digests))


def test_a_full_store_is_an_error_with_the_tokens_still_in_the_window_and_room_lets_it_go_on():
    ids = prompt(1, 900)
    steps = Steps(hands_over=True)
    with steps.runtime as runtime:  # how much the two prompts take
        steps(ids[:, :150])
        first, steps.cache = steps.cache, runtime.new_cache()
        steps(ids)
        used = runtime.stats().host_bytes
    steps = Steps(hands_over=True, host_memory=used)
    with steps.runtime as runtime:
        other, first = runtime.new_cache(), steps.cache
        steps(ids[:, :150])
        steps.cache = other
        steps(ids)
        steps.cache = first
        for t in range(150, 166):
            steps(ids[:, t : t + 1])
        with pytest.raises(PoolExhaustedError, match="bytes needed"):
            steps(ids[:, 166:167])
        assert steps.cache.get_seq_length() == 166
        assert steps.pages()[0].near.window_count(0) == WINDOW + PAGE_TOKENS
        del other
        gc.collect()
        steps(ids[:, 166:167])
        assert steps.pages()[0].near.window_count(0) == WINDOW + 1


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has cores and priorities of threads")
def test_background_threads_stay_on_the_cores_that_workers_leave_and_step_back():
    def tasks():
        return {int(task.name) for task in Path("/proc/self/task").iterdir()}

    steps, ids = Steps(hands_over=True), prompt(1, 152)
    with steps.runtime as runtime:
        steps(ids[:, :150])
        before = tasks()
        for t in (150, 151):
            steps(ids[:, t : t + 1])
        store = _core.PageStore(16, 16, "float32")
        runtime._services.inserter.serve(store)
        started = tasks() - before
        assert len(started) >= 3, "one that inserts, its helpers, one that packs"
        for task in started:
            assert os.getpriority(os.PRIO_PROCESS, task) == ahead._NICE
            assert os.sched_getaffinity(task) == set(_core.spare_cores())
    assert os.getpriority(os.PRIO_PROCESS, 0) < ahead._NICE


def test_unwrap_waits_for_what_is_under_way_and_dropped_caches_give_their_pages_back():
    ids = prompt(1, 160)
    steps = Steps(hands_over=True)
    started, release = threading.Event(), threading.Event()
    insert = ahead.insert

    def slow(*arguments):
        started.set()
        release.wait()
        insert(*arguments)

    ahead.insert = slow
    try:
        decode(steps, ids, 150)
        assert started.wait(30)
        stores = steps.runtime._services.stores
        steps.cache = None
        gc.collect()
        assert stores.used_bytes() > 0, "an insert under way keeps what it writes to"
        threading.Timer(0.05, release.set).start()
        steps.runtime.unwrap()
    finally:
        ahead.insert = insert
        release.set()
    assert release.is_set()
    assert stores.used_bytes() == 0
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("icecache-insert")]
