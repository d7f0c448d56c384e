"""Token oracle: exactly the best tokens, by brute force. The ceiling for every index at the same budget."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from icecache import _core
from icecache.config import PAGE_TOKENS
from icecache.select.base import Read, Request, Services
from icecache.transfer import Fetched

_BLOCK_PAGES = 256


class TokenOracle:
    """The ``16 n_pages`` tokens per KV head with the largest softmax mass, summed over the query group.

    Reads every page twice (logits, then the winners), block by block: correct and slow, for experiments only.
    """

    def read(self, services: Services, request: Request) -> Read:
        """Read the best tokens; they come packed as if they filled `n_pages` pages."""
        everything = _core.all_pages(request.forests)
        logits = self._logits(services, request, everything)
        total = torch.logsumexp(logits, dim=-1, keepdim=True)
        mass = torch.exp(logits - total).sum(2)
        n_tokens = min(request.n_pages * PAGE_TOKENS, mass.shape[-1])
        best = mass.topk(n_tokens, dim=-1).indices.sort(-1).values
        chosen = torch.logsumexp(logits.gather(-1, best[:, :, None].expand(-1, -1, logits.shape[2], -1)), dim=-1)
        lse = torch.stack([total[..., 0], chosen], dim=-1).float().cpu().numpy()
        keys, values = self._winners(services, request, everything, best)
        fetched = Fetched(keys, values, None, np.full(best.shape[:2], n_tokens, np.int64), 0)
        if services.trace is None:
            return Read(fetched, lse)
        slots = everything.positions().reshape(*best.shape[:2], -1)
        positions = np.take_along_axis(slots, best.cpu().numpy(), axis=-1)
        padded = np.full((*best.shape[:2], request.n_pages * PAGE_TOKENS), -1, np.int32)
        padded[..., :n_tokens] = positions
        shape = (*best.shape[:2], request.n_pages)
        return Read(fetched, lse, np.full(shape, -1, np.int64), padded.reshape(*shape, PAGE_TOKENS))

    @staticmethod
    def _blocks(n_pages: int) -> list[tuple[int, int]]:
        return [(first, min(first + _BLOCK_PAGES, n_pages)) for first in range(0, n_pages, _BLOCK_PAGES)]

    def _logits(self, services: Services, request: Request, everything: _core.Selection) -> torch.Tensor:
        """(R, H, G, T) float32; -inf in empty slots."""
        queries = torch.from_numpy(request.queries).to(request.device)
        parts = []
        for fetched in self._fetched(services, request, everything):
            block = torch.einsum("rhgd,rhtd->rhgt", queries, fetched.keys.float()) * request.scaling
            if request.softcap is not None:
                block = request.softcap * torch.tanh(block / request.softcap)
            if fetched.mask is not None:
                block = block.masked_fill(~fetched.mask[:, :, None], float("-inf"))
            parts.append(block)
        return torch.cat(parts, dim=-1)

    def _winners(
        self, services: Services, request: Request, everything: _core.Selection, best: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        n_rows, n_heads, n_tokens = best.shape
        keys = torch.zeros(n_rows, n_heads, n_tokens, request.key_dim, dtype=request.dtype, device=request.device)
        values = torch.zeros(n_rows, n_heads, n_tokens, request.value_dim, dtype=request.dtype, device=request.device)
        first = 0
        for fetched in self._fetched(services, request, everything):
            width = fetched.keys.shape[2]
            here = (best >= first) & (best < first + width)
            index = (best - first).clamp(0, width - 1)[..., None]
            for out, block in ((keys, fetched.keys), (values, fetched.values)):
                rows = block.gather(2, index.expand(-1, -1, -1, block.shape[-1]))
                out.copy_(torch.where(here[..., None], rows, out))
            first += width
        return keys, values

    def _fetched(self, services: Services, request: Request, everything: _core.Selection) -> Iterator[Fetched]:
        shape = (request.key_dim, request.value_dim, request.dtype, request.device)
        for first, last in self._blocks(everything.pages.shape[2]):
            yield services.staging.fetch(services.pool, services.recorder, everything, first, last, *shape)
