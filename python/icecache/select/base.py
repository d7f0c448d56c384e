"""The protocol of a selector, and the one rule that all of them share: what fits the budget is read whole."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from icecache import _core
from icecache.config import PAGE_TOKENS
from icecache.errors import BadTensorError, CacheStateError, ConfigError
from icecache.pages import Choice, Inserter, LayerPages, Offload, Stores, drain, hand_over
from icecache.select.charges import Charges
from icecache.stats import Recorder, Trace
from icecache.transfer import Fetched, PageReader, Staging


@dataclass(frozen=True, slots=True)
class Request:
    """One decode step of one layer, for some rows of the batch.

    Parameters
    ----------
    layer : int
        Layer of the model.
    forests : list of Forest
        One per row.
    queries : numpy.ndarray
        float32 (R, H, G, Dk), post-RoPE.
    n_pages : int
        Pages to read per KV head.
    scaling : float
        What the model multiplies its logits with.
    softcap : float or None
        ``softcap * tanh(logit / softcap)``, if the model does that.
    key_dim, value_dim, dtype, device
        Of the tensors to return.
    place : int
        Whose keys and values to return of the layers that share the forests; 0 is the leader.
    estimates : bool
        Whether the pages that are not chosen are estimated; their store has mean values then.
    """

    layer: int
    forests: list[_core.Forest]
    queries: npt.NDArray[np.float32]
    n_pages: int
    scaling: float
    softcap: float | None
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    device: torch.device
    place: int = 0
    estimates: bool = False


@dataclass(frozen=True, slots=True)
class Read:
    """What a selector chose and fetched.

    Parameters
    ----------
    fetched : Fetched
        The tokens, on the device.
    lse : numpy.ndarray or None
        float32 (R, H, G, 2): log-sum-exp of the scaled logits over all host tokens (estimate) and over the chosen
        ones. None: everything was chosen, or nobody knows.
    pages, positions : numpy.ndarray
        int64 (R, H, K) ids and int32 (R, H, K, 16) forest token indices, -1 where there is none. For the trace only.
    everything : bool
        Whether all host tokens of these rows were read.
    selection : Selection or None
        The pages, for the layers that share them; None: the selector chooses something else than pages.
    unread : numpy.ndarray or None
        float32 (R, H, G, Dv): what the pages that are not chosen would give. None: nobody has estimated it.
    """

    fetched: Fetched
    lse: npt.NDArray[np.float32] | None
    pages: npt.NDArray[np.int64] | None = None
    positions: npt.NDArray[np.int32] | None = None
    everything: bool = False
    selection: _core.Selection | None = None
    unread: npt.NDArray[np.float32] | None = None


@dataclass(slots=True)
class Services:
    """What a runtime lends to each of its layers."""

    pool: _core.Pool
    stores: Stores
    staging: Staging
    recorder: Recorder
    selector: Selector | None
    n_pages: int
    candidates: int
    """Pages a search scores from their keys."""
    offload: Offload
    inserter: Inserter
    reader: PageReader = field(default_factory=PageReader)
    trace: Trace | None = None
    mass: dict[torch.device, torch.Tensor] = field(default_factory=dict)
    """Sum of the estimated mass kept, on each device: read only when somebody asks, so a step need not wait."""
    charges: Charges = field(default_factory=Charges)
    """What the masks of a policy cost."""

    def offload_from(self, device: torch.device) -> Offload | None:
        """Who takes prompts from `device` in the background; None: nobody, the device needs every core itself."""
        return self.offload if device.type == "cuda" else None

    def reads_pages(self, pages: LayerPages) -> bool:
        """Whether the device can read these pages where they lie."""
        return pages.near.keys.device.type == "cuda" and self.stores.is_pinned()

    def drain(self, layers: Sequence[LayerPages]) -> None:
        """Move what is due from the windows of `layers` to their forests; see :func:`icecache.pages.drain`."""
        drain(self.pool, self.recorder, layers)

    def hand_over(self, layers: Sequence[LayerPages]) -> bool:
        """Start to insert what is due next, in the background; see :func:`icecache.pages.hand_over`."""
        return hand_over(self.inserter, self.recorder, layers)

    def fetch(self, request: Request, selection: _core.Selection) -> Fetched:
        """Bring all pages of a selection to the device."""
        shape = (request.key_dim, request.value_dim, request.dtype, request.device)
        return self.staging.fetch(self.pool, self.recorder, selection, *shape, place=request.place)

    def read(self, request: Request, selection: _core.Selection, *, everything: bool = False) -> Read:
        """Fetch a selection; ids and positions are copied out only when a trace is set."""
        fetched, lse = self.fetch(request, selection), None if everything else np.asarray(selection.lse)
        read = Read(fetched, lse, everything=everything, selection=selection, unread=selection.unread)
        if self.trace is None:
            return read
        return replace(read, pages=np.asarray(selection.pages), positions=selection.positions())


class Selector(Protocol):
    """Chooses what the query group of each KV head reads from the host."""

    def read(self, services: Services, request: Request) -> Read:
        """Choose and fetch at most ``16 n_pages`` tokens per KV head."""
        ...


def read_groups(
    services: Services, pages: LayerPages, queries: torch.Tensor, scaling: float, softcap: float | None
) -> Iterator[tuple[list[int], Read]]:
    """Read the host tokens of all rows: whole where they fit the budget, chosen by the selector elsewhere.

    A layer that shares its leader's pages reads what the leader has chosen in the same step.

    Pages of the tail are not full, so "as many pages as the budget has" would not cover a context that it covers in
    tokens; reading such rows whole keeps the promise that a covering budget equals dense attention.

    Parameters
    ----------
    queries : torch.Tensor
        (B, H, G, Dk), any dtype and device.

    Yields
    ------
    rows, read
        Rows of the batch and what was fetched for them; rows without host tokens do not appear.

    Raises
    ------
    BadTensorError
        If a query holds NaN or infinity.
    CacheStateError
        If the layers that share pages are not equally long.
    ConfigError
        If they share pages and the selector chooses something else than pages.
    """
    if services.selector is None or not pages.forests:
        return
    shelf, position = pages.shelf, pages.padding.n_positions
    shelf.check_even()
    if pages.place > 0:
        yield from _followed(services, pages, scaling, softcap)
        return
    choices: list[Choice] = []
    if shelf.n_places > 1:
        shelf.choices[position] = choices
    for rows, read in _led(services, pages, queries, scaling, softcap):
        if read.selection is not None:
            choices.append(Choice(rows, read.selection, read.everything))
        elif shelf.n_places > 1:
            msg = f"reuse must be 1 for a policy that chooses no pages, got {type(services.selector).__name__}"
            raise ConfigError(msg)
        yield rows, read


def _followed(
    services: Services, pages: LayerPages, scaling: float, softcap: float | None
) -> Iterator[tuple[list[int], Read]]:
    """Read the pages that the leader has chosen at this position."""
    choices = pages.shelf.choices.get(pages.padding.n_positions)
    if choices is None:
        msg = f"layer {pages.layer}: the layer whose pages it shares has not attended at the same position"
        raise CacheStateError(msg)
    for choice in choices:
        forests = [pages.forests[b] for b in choice.rows]
        queries = np.empty(0, np.float32)  # nobody searches
        request = _request(services, pages, forests, queries, scaling, softcap)
        read = services.read(request, choice.selection, everything=choice.everything)
        yield choice.rows, replace(read, lse=None)  # the leader's, for other queries


def _request(
    services: Services,
    pages: LayerPages,
    forests: list[_core.Forest],
    queries: npt.NDArray[np.float32],
    scaling: float,
    softcap: float | None,
) -> Request:
    near = pages.near
    shape = (near.keys.shape[-1], near.values.shape[-1], near.keys.dtype, near.keys.device)
    estimates = services.stores.value_means and pages.store.value_means
    return Request(
        pages.layer,
        forests,
        queries,
        services.n_pages,
        scaling,
        softcap,
        *shape,
        place=pages.place,
        estimates=estimates,
    )


def _led(
    services: Services, pages: LayerPages, queries: torch.Tensor, scaling: float, softcap: float | None
) -> Iterator[tuple[list[int], Read]]:
    """Choose and read."""
    assert services.selector is not None
    limit = services.n_pages * PAGE_TOKENS
    whole = [b for b in range(pages.n_rows) if 0 < len(pages.forests[b]) <= limit]
    chosen = [b for b in range(pages.n_rows) if len(pages.forests[b]) > limit]
    host = np.empty(0, np.float32)
    if chosen:
        host = queries.detach().float().cpu().contiguous().numpy()  # sync: the search runs on the host
    for rows in (whole, chosen):
        if not rows:
            continue
        forests = [pages.forests[b] for b in rows]
        row_queries = host if rows is whole or len(rows) == pages.n_rows else np.ascontiguousarray(host[rows])
        request = _request(services, pages, forests, row_queries, scaling, softcap)
        if rows is whole:
            yield rows, services.read(request, _core.all_pages(forests), everything=True)
        else:
            yield rows, _checked_read(services, request, rows)


def _checked_read(services: Services, request: Request, rows: Sequence[int]) -> Read:
    assert services.selector is not None
    try:
        return services.selector.read(services, request)
    except ValueError as error:
        bad = [b for b, q in zip(rows, request.queries, strict=True) if not np.isfinite(q).all()]
        if not bad:
            raise
        msg = f"layer {request.layer}, row {bad[0]}: queries hold NaN or infinity"
        raise BadTensorError(msg) from error
