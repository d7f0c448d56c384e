"""Take over a whole prompt: sink and window stay on the device, the middle goes to the forests of a group of layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from icecache import _core
from icecache.pages.layer import LayerPages, Layout, valid_tokens
from icecache.pages.move import Move, check_followers, insert
from icecache.pages.near import NearBuffer, NearRow
from icecache.pages.offload import Departure, Offload
from icecache.pages.padding import PaddingLog
from icecache.pages.shelf import Pair, Shelf, joined, row_dim
from icecache.pages.store import Stores, to_host
from icecache.stats import Recorder


def build(
    layout: Layout,
    layers: Sequence[int],
    stores: Stores,
    pool: _core.Pool,
    recorder: Recorder,
    pairs: Sequence[Pair],
    valid: torch.Tensor | None,
    offload: Offload | None = None,
) -> list[LayerPages]:
    """Take over the prompt of the layers of one group; usually that is one layer.

    Parameters
    ----------
    layers : sequence of int
        Layers of the model; the first one is the leader, whose keys decide on the pages.
    pairs : sequence of (torch.Tensor, torch.Tensor)
        Keys and values (n_rows, n_kv_heads, n_positions, dim) of each layer, of the same shapes; any device.
    valid : torch.Tensor or None
        Bool (n_rows, n_positions) on the CPU; False: padding. None: no padding.
    offload : Offload or None
        Takes the tokens to the host in the background; call `settle` on the pages before anything else then.

    Returns
    -------
    list of LayerPages
        One per layer.

    Raises
    ------
    BadTensorError, PoolExhaustedError
        Nothing is kept then.
    """
    keys, values = pairs[0]
    n_rows, n_heads, n_positions, key_dim = keys.shape
    width = row_dim(key_dim, values.shape[-1], len(layers))
    store = stores.get(key_dim, width, keys.dtype, keys.device)
    forests = [_core.Forest(store, n_heads) for _ in range(n_rows)] if layout.keeps_middle else []
    shelf = Shelf(store, forests, len(layers))
    leaving: list[Departure] = []
    near: list[list[NearRow]] = [[] for _ in layers]
    forgotten = []
    for b in range(n_rows):
        rows = [(valid_tokens(k[b], valid, b), valid_tokens(v[b], valid, b)) for k, v in pairs]
        n_tokens = rows[0][0].shape[1]
        sink = min(n_tokens, layout.sink_tokens)
        first = max(sink, n_tokens - layout.window_tokens)
        for of_layer, (k, v) in zip(near, rows, strict=True):
            of_layer.append(NearRow(k[:, :sink], v[:, :sink], k[:, first:], v[:, first:]))
        forgotten.append(0 if layout.keeps_middle else first - sink)
        if layout.keeps_middle and first > sink:
            middle = tuple((k[:, sink:first], v[:, sink:first]) for k, v in rows)
            leaving.append(Departure(tuple(layers), b, forests[b], middle))
    result = []
    for place, (layer, of_layer) in enumerate(zip(layers, near, strict=True)):
        padding = PaddingLog(n_rows)
        padding.append(n_positions, valid)
        result.append(LayerPages(layout, layer, NearBuffer(of_layer, layout.sink_tokens), shelf, place, padding))
        result[-1].forgotten = list(forgotten)
    if leaving and offload is not None:
        job = offload.submit(recorder, leaving)
        for pages in result:
            pages.await_job(job)
    elif leaving:
        with recorder.part("prefill_offload"):
            moves = [_move(departure) for departure in leaving]
        insert(pool, recorder, moves)
    return result


def _move(departure: Departure) -> Move:
    check_followers(departure.layers, departure.row, departure.pairs)
    keys, values = joined(departure.pairs)
    return Move(departure.layers[0], departure.row, departure.forest, to_host(keys), to_host(values))
