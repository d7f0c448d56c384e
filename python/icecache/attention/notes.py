"""What policies want to know about a prompt that keys and values do not say: its last queries, and who was attended.

Dimension key: B rows, H KV heads, G query heads per KV head, Q queries, N positions (padding included), D head dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from icecache.attention.attend import query_pieces
from icecache.errors import CacheStateError
from icecache.pages import WholeKV
from icecache.select import Needs, Prompt, capped


@dataclass(frozen=True, slots=True)
class Notes:
    """Notes of one layer, by position of the batch.

    Parameters
    ----------
    queries : torch.Tensor or None
        (B, H, G, W, D) float32: of the last W positions.
    attention : torch.Tensor or None
        float32 (B, H, N): softmax weight that each key got, summed over queries and the query group.
    """

    queries: torch.Tensor | None = None
    attention: torch.Tensor | None = None

    def after(
        self,
        needs: Needs,
        query: torch.Tensor,
        keys: torch.Tensor,
        valid: torch.Tensor | None,
        scaling: float,
        softcap: float | None,
    ) -> Notes:
        """Add one more dense forward.

        Parameters
        ----------
        query : torch.Tensor
            (B, H * G, Q, D), of the last Q positions.
        keys : torch.Tensor
            (B, H, N, D), of all positions so far.
        valid : torch.Tensor or None
            Bool (B, N) on the CPU: which positions are tokens; None: all.
        """
        n_rows, n_heads = keys.shape[:2]
        grouped = query.reshape(n_rows, n_heads, -1, *query.shape[2:])
        queries, attention = self.queries, self.attention
        if needs.last_queries:
            new = grouped[:, :, :, -needs.last_queries :].float()
            queries = new if queries is None else torch.cat([queries, new], 3)[:, :, :, -needs.last_queries :]
        if needs.attention:
            if valid is not None:
                valid = valid.to(keys.device)
            sums = attention_sums(grouped, keys, valid, scaling, softcap)
            if attention is not None:
                sums[..., : attention.shape[2]] += attention
            attention = sums
        return Notes(queries, attention)

    def select(self, rows: Sequence[int]) -> Notes:
        """Take these rows, in this order."""
        return Notes(*(None if t is None else t[list(rows)] for t in (self.queries, self.attention)))

    def crop(self, n_positions: int) -> Notes:
        """Without the newest positions; what they attended to stays counted."""
        queries, attention = self.queries, self.attention
        return Notes(
            None if queries is None else queries[:, :, :, : max(queries.shape[3] - n_positions, 0)],
            None if attention is None else attention[..., : max(attention.shape[2] - n_positions, 0)],
        )

    def check(self, needs: Needs, policy: str) -> None:
        """Raise if something that `needs` names was not noted.

        Raises
        ------
        CacheStateError
            The message names the remedy.
        """
        missing = [
            what
            for wanted, got, what in (
                (needs.last_queries, self.queries, "the queries of the last prompt tokens"),
                (needs.attention, self.attention, "the attention over the prompt"),
            )
            if wanted and (got is None or got.shape[3 if got is self.queries else 2] == 0)
        ]
        if missing:
            msg = (
                f"policy {policy!r} needs {' and '.join(missing)}, which this cache does not hold; process the prompt "
                "under this policy, or under icecache.policies.Prefill(...) and adopt that cache"
            )
            raise CacheStateError(msg)


def attention_sums(
    query: torch.Tensor, keys: torch.Tensor, valid: torch.Tensor | None, scaling: float, softcap: float | None
) -> torch.Tensor:
    """Causal softmax weights of each key, summed over the queries and the group; never T x T at once.

    A kernel does it on a CUDA device: blocks of logits in float32 are dear there, 10 of the 12 s that 64 prompts of 16k
    tokens took on an H100.

    Parameters
    ----------
    query : torch.Tensor
        (B, H, G, Q, D), of the last Q of N positions.
    keys : torch.Tensor
        (B, H, N, D).
    valid : torch.Tensor or None
        Bool (B, N), on the device.

    Returns
    -------
    torch.Tensor
        float32 (B, H, N).
    """
    if keys.is_cuda:
        from icecache.kernels.attention_sums import attention_sums as fused  # triton: only where there is a device

        return fused(query, keys, valid, scaling, softcap)
    n_rows, n_heads, group, n_queries, _ = query.shape
    n_keys = keys.shape[2]
    sums = torch.zeros(n_rows, n_heads, n_keys, device=keys.device)
    columns = torch.arange(n_keys, device=keys.device)
    turned = keys.float().transpose(-1, -2)
    for start, stop in query_pieces(query, n_keys):
        first = n_keys - n_queries
        seen = n_keys - n_queries + stop  # later keys are hidden from every query of this piece
        piece = query[:, :, :, start:stop].float().flatten(2, 3) * scaling
        logits = capped(torch.matmul(piece, turned[..., :seen]), softcap).view(n_rows, n_heads, group, -1, seen)
        allowed = columns[:seen] <= torch.arange(first + start, first + stop, device=keys.device)[:, None]
        if valid is not None:
            allowed = allowed & valid[:, None, :seen] & valid[:, first + start : first + stop, None]
            allowed = allowed[:, None, None]
        logits = logits.masked_fill(~allowed, float("-inf"))
        sums[..., :seen] += torch.softmax(logits, -1).nan_to_num_(0.0).sum((2, 3))
    return sums


def read_prompt(
    whole: WholeKV, notes: Notes, layer: int, n_layers: int, scaling: float, softcap: float | None
) -> Prompt:
    """Turn notes by position into a prompt by token."""
    device, n_tokens = whole.keys.device, max(whole.n_prompt)
    n_positions = whole.prompt_positions
    valid = whole.padding.valid()[:, :n_positions]
    queries, queries_valid = notes.queries, None
    if queries is not None:
        queries_valid = valid[:, n_positions - queries.shape[3] :].to(device)
        order = queries_valid.int().argsort(dim=1, stable=True)  # tokens to the right, in order
        index = order[:, None, None, :, None].expand(queries.shape)
        queries, queries_valid = queries.gather(3, index), queries_valid.gather(1, order)
    attention = notes.attention
    if attention is not None:
        order = (~valid).int().argsort(dim=1, stable=True)[:, :n_tokens].to(device)  # tokens to the left
        attention = attention.gather(2, order[:, None].expand(-1, attention.shape[1], -1))
    return Prompt(
        layer=layer,
        n_layers=n_layers,
        keys=whole.keys[:, :, :n_tokens],
        values=whole.values[:, :, :n_tokens],
        lengths=whole.device_prompt(),
        queries=queries,
        queries_valid=queries_valid,
        attention=attention,
        scaling=scaling,
        softcap=softcap,
    )
