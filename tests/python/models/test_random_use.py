"""Random sequences of everything a cache can be asked for, against a dense forward over the whole text each time."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from icecache import IceRuntime
from tiny import VOCABULARY, build
from transformers import DynamicCache


def forward(model, ids, cache, **kwargs):
    with torch.no_grad():
        return model(ids, past_key_values=cache, use_cache=True, **kwargs).logits


class Use:
    """A cache of ours, and the text and padding mask that it should stand for."""

    def __init__(self, model, runtime, n_rows, seed):
        self.model, self.runtime = model, runtime
        self.random, self.generator = random.Random(seed), torch.Generator().manual_seed(seed)
        self.cache = runtime.new_cache()
        self.ids = self.mask = torch.zeros(n_rows, 0, dtype=torch.long)
        self.others = []

    def feed(self, n_new, padded):
        """New positions, left-padded in all rows but the first."""
        n_rows = len(self.ids)
        new = torch.randint(3, VOCABULARY, (n_rows, n_new), generator=self.generator)
        mask = torch.ones(n_rows, n_new, dtype=torch.long)
        for row in range(1, n_rows if padded else 1):
            mask[row, : self.random.randint(0, n_new - 1 if self.ids.shape[1] == 0 else n_new)] = 0
        self.ids, self.mask = torch.cat([self.ids, new], 1), torch.cat([self.mask, mask], 1)
        positions = (self.mask.cumsum(-1) - 1).clamp(min=0)
        options = {"attention_mask": self.mask, "position_ids": positions}
        dense = forward(self.model, self.ids, DynamicCache(), **options)[:, -n_new:]
        options["position_ids"] = positions[:, -n_new:]
        got = forward(self.model, new, self.cache, **options)
        error = (got - dense)[mask.bool()].abs().max()
        assert error <= 3e-4 * dense.abs().max()

    def check_storage(self):
        for pages in (layer.pages for layer in self.cache.layers):
            if pages is not None:
                assert [pages.length(b) for b in range(len(self.ids))] == self.mask.sum(1).tolist()
                for forest in pages.forests:
                    forest.validate()

    def decode(self):
        for _ in range(self.random.randint(1, 40)):
            self.feed(1, padded=False)

    def chunk(self):
        self.feed(self.random.randint(1, 40), padded=self.random.random() < 0.5)

    def crop(self):
        n = self.random.randint(1, min(self.ids.shape[1] - 1, self.random.choice([3, 20, 200])))
        self.cache.crop(-n)
        self.ids, self.mask = self.ids[:, :-n], self.mask[:, :-n]

    def move_rows(self):
        rows = torch.tensor(self.random.choices(range(len(self.ids)), k=self.random.randint(1, 3)))
        self.cache.batch_select_indices(rows)
        self.ids, self.mask = self.ids[rows], self.mask[rows]

    def fork(self):
        self.others.append((copy.deepcopy(self.cache), self.ids, self.mask))

    def go_on_with_a_fork(self):
        if self.others:
            at = self.random.randrange(len(self.others))
            mine = self.cache, self.ids, self.mask
            (self.cache, self.ids, self.mask), self.others[at] = self.others[at], mine


STEPS = [Use.decode, Use.decode, Use.chunk, Use.crop, Use.move_rows, Use.fork, Use.go_on_with_a_fork]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("family", "reuse"), [("llama", 1), ("gpt2", 1), ("llama", 3), ("qwen3", 2)])
def test_a_cache_under_a_covering_budget_stands_for_its_text_whatever_was_done_to_it(family, reuse, seed):
    model, draw = build(family), random.Random(seed)
    near = {"sink_tokens": draw.choice([0, 4, 16]), "window_tokens": draw.choice([1, 16, 32])}
    options = {"dense_below": draw.choice([0, 60, 150]), "sparse_prefill": draw.random() < 0.25, "threads": 1}
    with IceRuntime.wrap(model, budget=sum(near.values()) + 4800, **near, **options, reuse=reuse) as runtime:
        use = Use(model, runtime, draw.choice([1, 2, 3]), seed)
        use.feed(draw.randint(20, 200), padded=True)
        for _ in range(12):
            draw.choice(STEPS)(use)
            use.check_storage()
