"""One decode step of one layer: sink, window and chosen pages, merged by log-sum-exp, and an estimate of the rest.

Dimension key: B rows, H KV heads, G query heads per KV head, D head dim.

Pages that are not read can count as one more part (`IceConfig.estimate_unread`), whose log-sum-exp and output the
search estimates from what it knows of each page. Left out, their share of the softmax goes to the tokens that are read,
and where attention is spread thin that share is most of it (docs/LOG.md).
"""

from __future__ import annotations

import numpy as np
import torch

from icecache.attention.mass import add_mass, kept_sum, unread_lse
from icecache.attention.partial import Partial, merge, partial_attention, with_sink_logits
from icecache.pages import LayerPages
from icecache.select import Read, Services, read_groups
from icecache.stats import TraceEvent


def decode_attention(
    services: Services,
    pages: LayerPages,
    query: torch.Tensor,
    *,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attend with the newest token, whose key and value are already in the window.

    Parameters
    ----------
    query : torch.Tensor
        (B, H * G, 1, D), post-RoPE.
    scaling, softcap
        As in :func:`partial_attention`.
    sinks : torch.Tensor or None
        (H * G,), extra logits.

    Returns
    -------
    torch.Tensor
        (B, 1, H * G, Dv) in the query's dtype.

    Raises
    ------
    BadTensorError
        If a query holds NaN or infinity.
    """
    keys, values, live = pages.near.view()
    n_rows, n_heads = keys.shape[:2]
    grouped = query.view(n_rows, n_heads, -1, 1, query.shape[-1])
    recorder = services.recorder
    with recorder.part("attention"):
        mask = None if live is None else live[:, None, None, None, :]
        part = partial_attention(grouped, keys, values, scaling=scaling, mask=mask, softcap=softcap)
    attended = np.array([[pages.near.count(b)] * n_heads for b in range(n_rows)])
    unread: list[tuple[list[int], Read]] = []
    for rows, read in read_groups(services, pages, grouped[:, :, :, 0], scaling, softcap):
        attended[rows] += read.fetched.n_tokens
        with recorder.part("attention"):
            part = _with_read(part, rows, read, grouped, scaling, softcap)
        if services.trace is not None:
            services.trace(_event(pages, rows, read))
        if not read.everything:
            unread.append((rows, read))
    if sinks is not None:
        part = with_sink_logits(part, sinks)
    recorder.attended(attended)
    _count_mass(services, part, unread)
    part = _with_unread(part, unread)
    return part.out.reshape(n_rows, 1, -1, values.shape[-1]).to(query.dtype)


def _with_read(
    part: Partial, rows: list[int], read: Read, query: torch.Tensor, scaling: float, softcap: float | None
) -> Partial:
    """Merge fetched tokens into the rows they belong to."""
    fetched = read.fetched
    mask = None if fetched.mask is None else fetched.mask[:, :, None, None, :]
    whole_batch = len(rows) == query.shape[0]
    rows_query = query if whole_batch else query[rows]
    far = partial_attention(rows_query, fetched.keys, fetched.values, scaling=scaling, mask=mask, softcap=softcap)
    if whole_batch:
        return merge([part, far])
    both = merge([Partial(part.out[rows], part.lse[rows]), far])
    index = torch.tensor(rows, device=query.device)
    return Partial(part.out.index_copy(0, index, both.out), part.lse.index_copy(0, index, both.lse))


def _with_unread(part: Partial, unread: list[tuple[list[int], Read]]) -> Partial:
    """Merge the estimate of what was not read, where there is one."""
    estimated = [(rows, read.lse, read.unread) for rows, read in unread if read.unread is not None]
    if not estimated:
        return part
    lse, out = torch.full_like(part.lse, float("-inf")), torch.zeros_like(part.out)
    for rows, read_lse, read_unread in estimated:
        assert read_lse is not None, "a search that estimates knows how much it has left out"
        lse[rows] = unread_lse(read_lse).to(lse.device)[..., None]
        out[rows] = torch.from_numpy(read_unread).to(out.device)[:, :, :, None]
    return merge([part, Partial(out, lse)])


def _count_mass(services: Services, part: Partial, unread: list[tuple[list[int], Read]]) -> None:
    """Add the shares attended: 1 for rows that were read whole.

    Rows whose selector knows no total, and policies without one, are left out.
    """
    lse = part.lse[..., 0]
    n_heads, n = lse.shape[1] * lse.shape[2], 0
    whole = set(range(lse.shape[0])) if services.selector is not None else set()
    kept: torch.Tensor | float = 0.0
    for rows, read in unread:
        whole -= set(rows)
        if read.lse is None:
            continue
        kept = kept + kept_sum(lse if len(rows) == lse.shape[0] else lse[rows], read.lse)
        n += len(rows) * n_heads
    n_whole = len(whole) * n_heads
    add_mass(services, lse.device, kept + float(n_whole), n + n_whole)


def _event(pages: LayerPages, rows: list[int], read: Read) -> TraceEvent:
    assert read.pages is not None
    assert read.positions is not None
    lengths = tuple(pages.length(b) for b in rows)
    positions = np.where(read.positions >= 0, read.positions + pages.layout.sink_tokens, -1).astype(np.int32)
    window = tuple(n - pages.near.window_count(b) for n, b in zip(lengths, rows, strict=True))
    return TraceEvent(
        layer=pages.layer,
        rows=tuple(rows),
        lengths=lengths,
        sink_tokens=tuple(pages.near.sinks[b] for b in rows),
        window_start=window,
        pages=read.pages,
        positions=positions,
    )
