"""Where the keys of a layer without pages stand in its buffers, step by step, and what its rows attend to."""

from __future__ import annotations

import random

import pytest
import torch
from icecache.attention import StaticKV, StaticShape, static_kv
from icecache.pages.padding import PaddingLog


class Kept:
    """A cache layer that keeps everything it is given, or a window."""

    def __init__(self, keys, length):
        self.keys, self.values, self.cumulative_length = keys, keys[..., :3] * 2, length

    def get_seq_length(self):
        return self.cumulative_length


def token(t):
    return torch.full((2, 2, 1, 4), float(t))


@pytest.mark.parametrize("window", [None, 6])
def test_rows_see_their_own_tokens_only_while_buffers_grow_and_windows_move(monkeypatch, window):
    monkeypatch.setattr(static_kv, "ROOM_COLUMNS", 2)
    monkeypatch.setattr(static_kv, "ROOM_PART", 1 << 30)
    pads, n = [0, 3], 8
    first = 0 if window is None else n - (window - 1)
    layers = [Kept(torch.cat([token(t) for t in range(first, n)], 2), n)]
    buffers = StaticKV([StaticShape.of(7, layers[0], window)])
    grown = [buffers.hold(layers)]
    for length in range(n, n + 12):
        grown += [buffers.hold(layers)]
        buffers.write_bounds(layers, length, pads)
        (layer,), (bounds,) = buffers.layers, buffers._bounds.tolist()
        stop = bounds[0][2]
        layer.keys[:, :, stop - 1], layer.values[:, :, stop - 1] = length, 2.0 * length  # what a step writes
        for (none, start, end), pad in zip(bounds, pads, strict=True):
            oldest = pad if window is None else max(pad, length + 1 - window)
            assert none == 0
            assert layer.keys[0, 0, start:end, 0].tolist() == list(range(oldest, length + 1))
        buffers.count_one(layers)
        kept = layers[0]
        oldest = 0 if window is None else length + 1 - (window - 1)
        assert kept.keys[1, 1, :, 2].tolist() == list(range(oldest, length + 1))
        assert torch.equal(kept.values, kept.keys[..., :3] * 2)
        assert kept.get_seq_length() == (n if window is None else length + 1), "a dense layer counts its columns"
    assert sum(grown) == (1 if window else 4)


def test_who_is_moved_out_and_who_crops_keep_their_own(monkeypatch):
    monkeypatch.setattr(static_kv, "ROOM_COLUMNS", 4)
    one, two = (Kept(torch.cat([token(base + t) for t in range(5)], 2), 5) for base in (0, 100))
    buffers = StaticKV([StaticShape.of(0, one, None)])
    buffers.hold([one])
    one.keys, one.values = one.keys[:, :, :3], one.values[:, :, :3]
    assert not buffers.hold([one]), "a crop stays where it is"
    buffers.write_bounds([one], 3, [0, 0])
    assert buffers._bounds[0, 0].tolist() == [0, 0, 4]
    before = one.keys.clone()
    buffers.hold([two])
    assert torch.equal(one.keys, before)
    assert one.keys.untyped_storage().data_ptr() != two.keys.untyped_storage().data_ptr()
    buffers.release()
    buffers.layers[0].keys.fill_(-1.0)
    assert torch.equal(two.keys, torch.cat([token(100 + t) for t in range(5)], 2))


@pytest.mark.parametrize("seed", range(30))
def test_leading_padding_is_told_from_padding_between_tokens(seed):
    draw, log = random.Random(seed), PaddingLog(3)
    for _ in range(draw.randint(1, 5)):
        n = draw.randint(1, 4)
        valid = torch.tensor([[draw.random() < 0.5 + seed / 60 for _ in range(n)] for _ in range(3)])
        log.append(n, draw.choice([None, valid]))
        if draw.random() < 0.2:
            log.crop(draw.randint(0, log.n_positions))
        rows = [row.tolist() for row in log.valid()]
        pads = [[*row, True].index(True) for row in rows]
        expected = pads if all(all(row[n:]) for row, n in zip(rows, pads, strict=True)) else None
        assert log.leading() == expected
        assert log.leading() == expected
