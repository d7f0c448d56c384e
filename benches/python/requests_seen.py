"""What the search is asked while needle tasks are answered, and the keys of the pages it is asked about."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from icecache import IceRuntime, _core
from icecache.eval.needle import Sample
from icecache.eval.needle.runner import ask
from icecache.hf.names import cache_argument
from icecache.pages import as_bytes
from icecache.select import Request, TreeSearch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

Place = tuple[int, int, int]
"""Layer, row, KV head."""


def page_keys(request: Request) -> Iterator[tuple[Place, torch.Tensor, torch.Tensor]]:
    """Keys (N, 16, D) of all pages of every row and head, as float32, and which slots hold a token (N, 16)."""
    for row, forest in enumerate(request.forests):
        shape = forest.n_kv_heads, len(forest)
        keys, values = (torch.empty(*shape, n, dtype=request.dtype) for n in (request.key_dim, request.value_dim))
        forest.read(0, len(forest), as_bytes(keys), as_bytes(values))
        places = torch.from_numpy(_core.all_pages([forest]).positions()[0]).long()
        for head in range(forest.n_kv_heads):
            at = places[head][(places[head] >= 0).any(1)]
            yield (request.layer, row, head), keys[head][at.clamp(min=0)].float(), at >= 0


def prefill(model: PreTrainedModel, batch: Sequence[Sample]) -> DynamicCache:
    """Compute the contexts densely."""
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        tokens = torch.tensor([sample.context for sample in batch])
        model(tokens, **cache_argument(cache), use_cache=True, logits_to_keep=1)
    return cache


def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    batch: Sequence[Sample],
    cache: DynamicCache,
    look: Callable[[Request], None],
) -> None:
    """Ask and answer under a budget of 256; `look` sees every request of every layer before it is served."""
    read = TreeSearch.read

    def looking(self, services, request):  # type: ignore[no-untyped-def]
        look(request)
        return read(self, services, request)

    TreeSearch.read = looking  # type: ignore[method-assign]
    try:
        with torch.inference_mode(), IceRuntime.wrap(model, budget=256) as runtime:
            ask(model, tokenizer, batch, runtime.adopt(cache))
    finally:
        TreeSearch.read = read  # type: ignore[method-assign]
