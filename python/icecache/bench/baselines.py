"""The strongest full attention we can make: a flash-decoding kernel over a static cache, a step in one CUDA graph.

It is the same kernel that reads our near tokens, given the whole context as near tokens, so the comparison is between
reading everything and reading some pages, not between two kernels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from transformers import AttentionInterface
from transformers.cache_utils import Cache

from icecache.bench.synthetic import Content
from icecache.hf.names import cache_argument

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAME = "icebench_static"


class _Window(Cache):  # type: ignore[misc]
    """Hands new keys through; the attention function below writes them."""

    def __init__(self) -> None:
        super().__init__(layers=[])

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *_args: object,
        **_kwargs: object,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Nothing is kept here."""
        return key_states, value_states

    def get_seq_length(self, *_args: object) -> int:
        """Not 0, or masks would be built for a prompt."""
        return 1

    def get_mask_sizes(self, *_args: object, **_kwargs: object) -> tuple[int, int]:
        """As after one token."""
        return 2, 0


class StaticGraph:
    """A decode step of full attention over a preallocated cache.

    Parameters
    ----------
    model : PreTrainedModel
        On a CUDA device; gets its attention implementation back from `close`.
    content : Content
        What the cache holds.
    n_new : int
        Room for so many tokens more.
    """

    def __init__(self, model: PreTrainedModel, content: Content, n_new: int) -> None:
        self.model, self._before = model, model.config._attn_implementation
        shape = (content.n_rows, content.n_kv_heads, content.n_tokens + n_new, content.head_dim)
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        for keys, values in content.layers():
            for kept, part in ((self.keys, keys), (self.values, values)):
                whole = torch.zeros(shape, dtype=content.dtype, device=content.device)
                whole[:, :, : content.n_tokens] = part
                kept.append(whole)
        self._n = content.n_tokens
        self.ids = torch.zeros(content.n_rows, 1, dtype=torch.long, device=content.device)
        self.positions = torch.full_like(self.ids, self._n)
        self.bounds = torch.tensor([[0, 0, self._n + 1]] * content.n_rows, dtype=torch.int32, device=content.device)
        self._table = torch.zeros(*shape[:2], 0, dtype=torch.int64, device=content.device)
        AttentionInterface.register(_NAME, self._attention)
        model.set_attn_implementation(_NAME)
        self._graph, self._token = self._capture()

    def close(self) -> None:
        """Free the cache and restore the model."""
        self.model.set_attn_implementation(self._before)
        self.keys.clear()
        self.values.clear()
        del self._graph

    def step(self) -> torch.Tensor:
        """Decode one token greedily; returns ids (B, 1), asynchronously."""
        self._graph.replay()
        self.ids.copy_(self._token)
        self.positions += 1
        self.bounds[:, 2] += 1
        return self.ids

    def _capture(self) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        cache = _Window()

        def call() -> torch.Tensor:
            out = self.model(self.ids, **cache_argument(cache), position_ids=self.positions, use_cache=True)
            logits: torch.Tensor = out.logits
            return logits[:, -1:].argmax(-1)

        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()
            call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            token = call()
        return graph, token

    def _attention(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        _mask: torch.Tensor | None,
        scaling: float,
        **_arguments: object,
    ) -> tuple[torch.Tensor, None]:
        from icecache.kernels.paged_decode import paged_decode
        from icecache.kernels.window_append import window_append

        layer = int(module.layer_idx)  # type: ignore[arg-type]
        keys, values = self.keys[layer], self.values[layer]
        window_append(key, value, keys, values, self.bounds)
        n_rows, n_heads = keys.shape[:2]
        grouped = query.reshape(n_rows, n_heads, -1, query.shape[-1]).contiguous()
        out, _ = paged_decode(grouped, keys, values, self.bounds, self._table, scaling)
        return out.reshape(n_rows, 1, -1, values.shape[-1]), None
