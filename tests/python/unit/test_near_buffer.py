"""Sink and window buffer, padding log and layer storage, against plain Python lists of tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from icecache import _core
from icecache.pages import Layout, PaddingLog, Stores, build, drain
from icecache.pages.layer import read_back
from icecache.stats import Recorder

HEADS, DIM = 2, 8
STEP = 2.0**-4
"""From the keys of one layer to those of the next; exact beside token numbers up to 2**20."""


def token_keys(tokens: list[int]) -> torch.Tensor:
    """Keys [H, n, D] that name their tokens."""
    base = torch.tensor(tokens, dtype=torch.float32)[None, :, None]
    return base + torch.arange(HEADS)[:, None, None] * 0.25 + torch.zeros(HEADS, len(tokens), DIM)


class LayerModel(RuleBasedStateMachine):
    """`LayerPages` under appends (padded too), drains, crops, forks and reorders, against lists of token numbers.

    Up to three layers share the pages; keys of each differ by a constant. Each is asked in turn, as transformers does.
    """

    pool = _core.Pool(1)

    @initialize(
        n=st.integers(1, 90),
        sink=st.sampled_from([0, 4, 16]),
        window=st.sampled_from([1, 8, 32]),
        keeps=st.booleans(),
        seed=st.integers(0, 2**32 - 1),
        n_layers=st.integers(1, 3),
    )
    def build(self, n, sink, window, keeps, seed, n_layers):
        self.layout, self.recorder, self.next_token = Layout(sink, window, keeps), Recorder(), 0
        self.rows = [[], [], []]
        self.positions = 0
        keys, valid = self._new(n, seed)
        pairs = self._pairs(keys, n_layers)
        self.group = build(self.layout, range(n_layers), Stores(None), self.pool, self.recorder, pairs, valid)

    @staticmethod
    def _pairs(keys, n_layers):
        """Keys and values of all layers."""
        return [(keys + place * STEP, -keys - place * STEP) for place in range(n_layers)]

    def _append(self, group, keys, valid):
        for pages, pair in zip(group, self._pairs(keys, len(group)), strict=True):
            pages.append(*pair, valid)

    def _new(self, n, seed):
        """`n` new positions for every row; some are padding."""
        rng = np.random.default_rng(seed)
        valid = torch.from_numpy(rng.random((len(self.rows), n)) < rng.choice([0.6, 1.0]))
        keys = []
        for row, live in zip(self.rows, valid, strict=True):
            tokens = list(range(self.next_token, self.next_token + n))
            self.next_token += n
            keys.append(token_keys(tokens))
            row += [(self.positions + i, t) for i, t in enumerate(tokens) if live[i]]
        self.positions += n
        return torch.stack(keys), None if bool(valid.all()) else valid

    @rule(n=st.integers(1, 40), seed=st.integers(0, 2**32 - 1))
    def append(self, n, seed):
        keys, valid = self._new(n, seed)
        self._append(self.group, keys, valid)

    @rule()
    def drain(self):
        drain(self.pool, self.recorder, self.group)
        for pages in self.group:
            for b in range(pages.n_rows):
                over = pages.near.window_count(b) - self.layout.window_tokens
                assert over <= (15 if self.layout.keeps_middle else 0)

    @rule()
    def draining_some_layers_of_a_group_does_nothing(self):
        if len(self.group) > 1:
            before = [pages.near.window_count(0) for pages in self.group]
            drain(self.pool, self.recorder, self.group[1:])
            assert [pages.near.window_count(0) for pages in self.group] == before

    @rule(n=st.integers(0, 200))
    def crop(self, n):
        if not self.layout.keeps_middle:
            return
        n = min(n, self.positions - 1)
        self.positions -= n
        self.rows = [[(p, t) for p, t in row if p < self.positions] for row in self.rows]
        for pages in self.group:
            pages.crop(n)
        self.group[0].shelf.check_even()

    @rule(order=st.lists(st.integers(0, 2), min_size=3, max_size=3))
    def reorder(self, order):
        self.group = [pages.select(order) for pages in self.group]
        self.rows = [list(self.rows[b]) for b in order]

    @rule()
    def fork(self):
        other = [pages.fork() for pages in self.group]
        before = self._held()
        self._append(other, token_keys([10**6] * 20).expand(3, -1, -1, -1), None)
        drain(self.pool, self.recorder, other)
        assert self._held() == before

    def _held(self):
        held = [self._held_by(pages) for pages in self.group]
        assert held.count(held[0]) == len(held)
        return held[0]

    @staticmethod
    def _held_by(pages):
        """Token numbers of every row, and of how many the middle was forgotten."""
        rows = []
        for b in range(pages.n_rows):
            near = pages.near.row(b)
            keys, values = [near.sink_keys], [near.sink_values]
            if pages.forests:
                n = len(pages.forests[b])
                middle = read_back(pages.forests[b], 0, n, near.sink_keys, near.sink_values, pages.place)
                keys.append(middle[0])
                values.append(middle[1])
            keys.append(near.window_keys)
            joined, negated = torch.cat(keys, 1), torch.cat([*values, near.window_values], 1)
            joined, negated = joined - pages.place * STEP, negated + pages.place * STEP
            assert torch.equal(joined, -negated)
            assert torch.equal(joined[1], joined[0] + 0.25)
            rows.append([int(x) for x in joined[0, :, 0]])
        return rows

    @invariant()
    def every_token_is_held_once_and_in_order(self):
        held, pages = self._held(), self.group[-1]
        for b, row in enumerate(self.rows):
            tokens = [t for _, t in row]
            assert pages.length(b) == len(tokens)
            if self.layout.keeps_middle:
                assert held[b] == tokens
            else:
                sink = min(self.layout.sink_tokens, len(tokens))
                kept = pages.near.window_count(b)
                assert held[b] == tokens[:sink] + tokens[len(tokens) - kept :]

    @invariant()
    def a_window_is_never_shorter_than_promised(self):
        if self.layout.keeps_middle:
            for b, row in enumerate(self.rows):
                n_after_sink = max(0, len(row) - self.layout.sink_tokens)
                assert self.group[-1].near.window_count(b) >= min(self.layout.window_tokens, n_after_sink)

    @invariant()
    def the_view_shows_exactly_the_near_tokens(self):
        near = self.group[-1].near
        keys, _, mask = near.view()
        for b in range(near.n_rows):
            row = near.row(b)
            live = keys[b] if mask is None else keys[b][:, mask[b]]
            assert torch.equal(live, torch.cat([row.sink_keys, row.window_keys], 1))
        assert keys.isfinite().all()


TestLayerModel = LayerModel.TestCase
TestLayerModel.settings = settings(max_examples=40, stateful_step_count=20, deadline=None)


def test_a_padding_log_knows_which_positions_are_tokens():
    log = PaddingLog(2)
    log.append(3, torch.tensor([[False, True, True], [True, True, True]]))
    for _ in range(4):
        log.append(1, None)
    log.append(2, torch.tensor([[False, True], [True, False]]))
    assert log.n_positions == 9
    assert log.valid().tolist()[0] == [False, True, True, True, True, True, True, False, True]
    assert log.select([1, 1]).valid().tolist() == [log.valid().tolist()[1]] * 2
    assert log.crop(7) == [6, 6]
    assert log.valid().tolist() == [[False, True], [True, True]]


def test_a_long_decode_is_one_run_of_the_padding_log():
    log = PaddingLog(1)
    for _ in range(1000):
        log.append(1, None)
    assert len(log._runs) == 1


def test_a_long_chunk_gives_its_memory_back_when_it_leaves():
    keys = torch.zeros(1, HEADS, 100, DIM)
    pages = build(Layout(16, 32), [0], Stores(None), LayerModel.pool, Recorder(), [(keys, keys)], None)[0]
    start = pages.near.nbytes()
    chunk = torch.zeros(1, HEADS, 5000, DIM)
    pages.append(chunk, chunk, None)
    assert pages.near.nbytes() > 20 * start
    drain(LayerModel.pool, Recorder(), [pages])
    assert pages.near.nbytes() <= 2 * start


@pytest.mark.parametrize("n", [0, 1, 15, 16, 17, 47, 48, 49, 64, 65])
def test_prompts_of_any_length_are_split_into_sink_middle_and_window(n):
    keys = token_keys(list(range(n)))[None]
    pages = build(Layout(16, 32), [0], Stores(None), LayerModel.pool, Recorder(), [(keys, keys)], None)[0]
    assert pages.near.sinks == [min(n, 16)]
    assert pages.near.window_count(0) == max(0, min(n - 16, 32))
    assert len(pages.forests[0]) == max(0, n - 48)
