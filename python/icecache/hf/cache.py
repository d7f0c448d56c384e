"""One layer's KV cache as transformers sees it. `update` stages, `attend` computes and commits.

Life of a layer: *short* (everything dense on the device, the model's own attention) until the sequence, padding
included, reaches ``dense_below``; the step that reaches it is still computed densely, then the layer is *paged* for
good. Invariant: exactly one of `_dense` and `_pages` is set once the first step is over.
"""

from __future__ import annotations

import weakref

import torch
from transformers.cache_utils import CacheLayerMixin

from icecache.attention import DeviceStep, Inside, decode_attention, stream_attention
from icecache.errors import BadTensorError, CacheStateError, UnsupportedModelError
from icecache.hf.call import Call, Pair
from icecache.hf.group import page_in, send
from icecache.hf.masks import chunk_mask, prompt_padding
from icecache.hf.static import with_sinks
from icecache.hf.step import Engine, Sequence, current_step
from icecache.pages import LayerPages, WholeKV


class RetrievalLayer(CacheLayerMixin):  # type: ignore[misc]
    """A cache layer whose middle lives in host pages. Reading `.keys` or `.values` raises: there is no dense cache."""

    is_sliding = False
    window: int | None = None
    """Of sliding-window attention, which we do not serve."""
    is_compileable = False  # generate() then neither compiles by itself nor builds 4D masks beforehand
    is_croppable = True
    supports_early_init = False

    def __init__(self, engine: Engine, sequence: Sequence, layer_idx: int, members: tuple[int, ...] = ()) -> None:
        # No super().__init__(): it would assign the raising properties below.
        self.engine, self.sequence, self.layer_idx = engine, sequence, layer_idx
        self.members = members or (layer_idx,)
        """Numbers of the layers that share pages, this one included; the first one leads."""
        sequence.layers[layer_idx] = weakref.ref(self)
        self.unsupported: str | None = None
        self.may_be_shared = True
        self.group: int | None = None
        """Query heads per KV head, once the layer has attended."""
        self.softcap: float | None = None
        self._forget()
        engine.register(self)

    def _forget(self) -> None:
        self.is_initialized = False
        self._length = 0
        self._dense: Pair | None = None
        self._pages: LayerPages | WholeKV | None = None
        self.valid: torch.Tensor | None = None
        """Of a prompt that waits for the other layers of its group: bool (n_rows, n_positions), False is padding."""
        self._staged: Pair | None = None
        self._last: tuple[weakref.ref[torch.Tensor], weakref.ref[torch.Tensor]] | None = None
        self._deferred: tuple[Pair, torch.Tensor | None] | None = None
        self._before_chunk: LayerPages | WholeKV | None = None
        self._shared_call = self._sent = False

    @property
    def keys(self) -> torch.Tensor:
        """Not available."""
        msg = f"layer {self.layer_idx}: something reads the dense keys or values of the cache directly"
        raise UnsupportedModelError(msg)

    values = keys

    # ---- what transformers asks for -------------------------------------------------------------------------------
    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:  # noqa: ARG002
        """Note dtype and device of the first keys."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.n_rows = key_states.shape[0]
        self.is_initialized = True

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *args: object,  # noqa: ARG002 - transformers' signature
        **kwargs: object,  # noqa: ARG002
    ) -> Pair:
        """Stage new keys and values and return what attention must be called with, tagged with this layer.

        Raises
        ------
        CacheStateError
            Outside of a forward of the model this cache belongs to.
        BadTensorError
            If dtype or device differ from those of the cache.
        UnsupportedModelError
            If gradients are required, or the layer was updated twice without attention.
        """
        self._check_use(key_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._check_fit(key_states)
        self._length += key_states.shape[-2]
        if self._pages is None and self._length < self.engine.config.dense_below:
            # Exactly what DynamicLayer does, its empty tensor included: attention sees the same bits and strides.
            old_k, old_v = self._dense or (key_states.new_empty(0), value_states.new_empty(0))
            key_states, value_states = torch.cat([old_k, key_states], -2), torch.cat([old_v, value_states], -2)
        elif self._dense is not None:
            key_states = torch.cat([self._dense[0], key_states], -2)
            value_states = torch.cat([self._dense[1], value_states], -2)
        self._staged, self._shared_call = (key_states, value_states), False
        self._last = weakref.ref(key_states), weakref.ref(value_states)
        # The tag dies as soon as a model transforms K. It is weak because a short layer holds the key: no cycle.
        key_states._ice_layer = weakref.ref(self)  # type: ignore[attr-defined]
        return key_states, value_states

    def _check_use(self, key_states: torch.Tensor) -> None:
        self.sequence.check()
        if self.engine.closed:
            msg = "this cache belongs to an unwrapped IceRuntime; start a new cache"
            raise CacheStateError(msg)
        step = current_step()
        if step is None or step.engine is not self.engine:
            msg = "this cache is only usable through the model that its IceRuntime wraps"
            raise CacheStateError(msg)
        if key_states.requires_grad:
            msg = f"layer {self.layer_idx}: gradients through the KV cache are not supported; use torch.no_grad()"
            raise UnsupportedModelError(msg)
        if self._staged is not None:
            msg = f"layer {self.layer_idx}: keys were given to the cache twice without attention in between"
            raise UnsupportedModelError(msg)

    def _check_fit(self, key_states: torch.Tensor) -> None:
        if key_states.shape[0] != self.n_rows:
            msg = f"layer {self.layer_idx}: the cache has {self.n_rows} rows, got keys of {key_states.shape[0]}"
            raise CacheStateError(msg)
        if key_states.dtype != self.dtype or key_states.device != self.device:
            msg = (
                f"layer {self.layer_idx}: the cache is {self.dtype} on {self.device}, got keys of {key_states.dtype} "
                f"on {key_states.device}"
            )
            raise BadTensorError(msg)

    def get_seq_length(self) -> int:
        """Positions seen so far, padding included."""
        self.sequence.settle()
        return self._length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys a mask has to cover."""
        return self.get_seq_length() + query_length, 0

    def get_max_length(self) -> int:
        """-1: the layer grows without bound."""
        return -1

    get_max_cache_shape = get_max_length  # the name up to transformers 5.9

    def reset(self) -> None:
        """Forget the sequence."""
        self.sequence.close()
        self._forget()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Take rows in the order of `beam_idx`; a row used twice is forked copy-on-write."""
        self._select(beam_idx.tolist())  # sync: the host holds the rows

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        if self.is_initialized:
            self._select([b for b in range(self.n_rows) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows of an index or bool tensor."""
        rows = indices.nonzero().flatten() if indices.dtype == torch.bool else indices
        self._select(rows.tolist())  # sync: the host holds the rows

    def _select(self, rows: list[int]) -> None:
        self.sequence.settle()
        if not self.is_initialized:
            return
        if self._pages is not None:
            self._pages = self._pages.select(rows)
        if self._dense is not None:
            index = torch.tensor(rows, device=self.device)
            self._dense = self._dense[0].index_select(0, index), self._dense[1].index_select(0, index)
        self.n_rows = len(rows)

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the newest ``-tokens_to_remove`` positions; a positive value is the length to keep (before 5.18)."""
        self.sequence.settle()
        if tokens_to_remove > 0:
            tokens_to_remove = min(0, tokens_to_remove - self._length)
        n_positions = min(-tokens_to_remove, self._length)
        if n_positions == 0 or not self.is_initialized:
            return
        self._cut(n_positions)
        if self._length == 0:
            self._forget()

    def _cut(self, n_positions: int) -> None:
        self._length -= n_positions
        if self._dense is not None:
            k, v = self._dense
            self._dense = k[..., :-n_positions, :], v[..., :-n_positions, :]
        if self._pages is not None:
            self._pages.crop(n_positions)

    def activate_past_recording(self) -> None:
        """Nothing to do: every token is kept, and tokens enter the index one step late, so small crops are cheap."""

    def offload(self) -> None:
        """Nothing to do: the data is on the host already."""

    prefetch = offload

    def __deepcopy__(self, memo: dict[int, object]) -> RetrievalLayer:
        self.sequence.settle()
        sequence = memo.setdefault(id(self.sequence), Sequence(broken=self.sequence.broken))
        assert isinstance(sequence, Sequence)
        return self.forked(self.engine, sequence)

    def forked(self, engine: Engine, sequence: Sequence) -> RetrievalLayer:
        """Independent copy under another engine or cache; pages are shared until one side writes."""
        new = type(self)(engine, sequence, self.layer_idx, self.members)
        new.group = self.group
        new.is_initialized, new._length, new.unsupported = self.is_initialized, self._length, self.unsupported
        if self.is_initialized:
            new.dtype, new.device, new.n_rows = self.dtype, self.device, self.n_rows
        if self._dense is not None:
            new._dense = self._dense[0].clone(), self._dense[1].clone()
        if self._pages is not None:
            new._pages = self._pages.fork()
        return new

    # ---- what the attention function and the hooks ask for --------------------------------------------------------
    @property
    def pages(self) -> LayerPages | None:
        """Storage of a paged layer."""
        return self._pages if isinstance(self._pages, LayerPages) else None

    @property
    def kept(self) -> LayerPages | WholeKV | None:
        """Storage of a layer that is not short any more, whatever it is."""
        return self._pages

    @property
    def staged(self) -> Pair | None:
        """Keys and values that wait for attention."""
        return self._staged

    def dense_pair(self) -> Pair | None:
        """All keys and values of a layer that is not paged yet (staged ones included)."""
        return None if self._pages is not None else self._staged or self._dense

    @property
    def deferred(self) -> Pair | None:
        """Keys and values of a later chunk that wait to be committed."""
        return None if self._deferred is None else self._deferred[0]

    def note_sent(self) -> None:
        """Note that the tokens of this step are committed."""
        self._deferred, self._sent = None, True

    def may_turn_dense(self) -> bool:
        """Whether the layer can become an ordinary dense one now, as the config asks for where it is not supported."""
        return self.engine.config.on_unsupported == "dense" and self.dense_pair() is not None

    def load(self, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor | None) -> None:
        """Fill an empty layer with (B, H, n, D) keys and values of n positions; `valid` bool (B, n) marks padding."""
        self.lazy_initialization(keys, values)
        self._length = keys.shape[-2]
        self._keep(keys, values, valid)
        if self._pages is not None:
            self._pages.settle()

    def expects(self, key: torch.Tensor, value: torch.Tensor) -> tuple[bool, bool]:
        """Whether (key, value) are the tensors of the last `update`."""
        last = (None, None) if self._last is None else (self._last[0](), self._last[1]())
        return last[0] is key, last[1] is value

    def attend(self, call: Call) -> torch.Tensor:
        """Attention output (B, Q, n_q_heads, Dv) for the staged tokens, which are committed on the way."""
        self._staged = None
        self.group, self.softcap = call.query.shape[1] // call.keys.shape[1], call.softcap
        self._shared_call = self._shared_call or call.shared
        if self._pages is None or (call.shared and call.keys.shape[-2] == self._length):
            out = call.dense()
            if not call.shared:
                paged = self._length >= self.engine.config.dense_below
                valid = prompt_padding(self.layer_idx, call.mask, self._length) if paged else None
                self._keep(call.keys, call.values, valid)
            return out
        return self._attend_past(call, chunk_mask(self, call))

    def _attend_past(self, call: Call, mask: Inside) -> torch.Tensor:
        """Attend to what is kept and to the staged tokens."""
        assert self._pages is not None
        if call.query.shape[2] == 1 and call.keys.shape[2] == 1:
            step = current_step()
            if step is not None and step.device is not None:
                return self._attend_on(step.device, call)
            if not call.shared:
                self._pages.append(call.keys, call.values, mask.valid)
            return self._decode(self._pages, call, call.query)
        if self.engine.sparse_chunks:
            return self._attend_token_by_token(self._pages, call, mask)
        if self._sent:
            msg = f"layer {self.layer_idx}: another layer shares its keys all of a sudden"
            raise UnsupportedModelError(msg)
        out = self._attend_chunk(self._pages, call, mask)
        if not call.shared and not send(self, call.keys, call.values, mask.valid):
            self._deferred = (call.keys, call.values), mask.valid  # until the end: a sharing layer comes later
        return out

    def _attend_chunk(self, kept: LayerPages | WholeKV, call: Call, mask: Inside) -> torch.Tensor:
        """Attend exactly with a later chunk, which `kept` does not hold yet."""
        assert isinstance(kept, LayerPages)
        return stream_attention(
            self.engine.services,
            kept,
            call.query,
            call.keys,
            call.values,
            mask,
            scaling=call.scaling,
            softcap=call.softcap,
            sinks=call.sinks,
        )

    def _decode(self, kept: LayerPages | WholeKV, call: Call, query: torch.Tensor) -> torch.Tensor:
        """Attend with one token a row, which `kept` holds already."""
        assert isinstance(kept, LayerPages)
        return decode_attention(
            self.engine.services, kept, query, scaling=call.scaling, softcap=call.softcap, sinks=call.sinks
        )

    def _attend_on(self, device: DeviceStep, call: Call) -> torch.Tensor:
        """Attend on static buffers; nothing is committed (see `commit_one`)."""
        if call.shared:
            msg = f"layer {self.layer_idx}: it shares the keys of another layer"
            raise UnsupportedModelError(msg)
        index = device.shape.index(self.layer_idx)
        out = device.attend(index, call.query, call.keys, call.values, call.scaling, call.softcap)
        lse = device.lse[index]
        return out if call.sinks is None or lse is None else with_sinks(out, lse, call.sinks)

    def commit_one(self) -> None:
        """Count one token per row that a replayed step has put into the near buffer."""
        assert isinstance(self._pages, LayerPages)
        self._length += 1
        self._pages.near.count_one()
        self._pages.padding.append(1, None)

    def _attend_token_by_token(self, pages: LayerPages | WholeKV, call: Call, mask: Inside) -> torch.Tensor:
        """Process a chunk exactly as if its tokens had come one by one."""
        if call.shared:
            assert self._before_chunk is not None
            pages = self._before_chunk.fork()
        elif self.may_be_shared:
            self._before_chunk = pages.fork()
        if mask.special is not None:
            msg = f"layer {self.layer_idx}: sparse prefill needs a plain causal mask inside the chunk"
            raise UnsupportedModelError(msg)
        services, outputs = self.engine.services, []
        first = call.keys.shape[2] - call.query.shape[2]
        for t in range(call.keys.shape[2]):
            valid = None if mask.valid is None or bool(mask.valid[:, t].all()) else mask.valid[:, t : t + 1]
            if isinstance(pages, LayerPages):
                services.drain([pages])
            pages.append(call.keys[:, :, t : t + 1], call.values[:, :, t : t + 1], valid)
            if t >= first:
                outputs.append(self._decode(pages, call, call.query[:, :, t - first : t - first + 1]))
        return torch.cat(outputs, dim=1)

    def _keep(self, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor | None) -> None:
        """Hold on to everything seen so far: dense while short, in pages from then on."""
        if self._length < self.engine.config.dense_below:
            self._dense = keys, values
            return
        self._dense, self.valid = (keys, values), valid
        page_in(self, valid)

    def get_length(self) -> int:
        """Positions, those of the step under way included."""
        return self._length

    def waiting(self, length: int) -> Pair | None:
        """All keys and values (of `length` positions), if they are only waiting for the other layers of the group."""
        ready = self._staged is None and self._dense is not None and self._dense[0].shape[-2] == self._length
        return self._dense if ready and self._length == length >= self.engine.config.dense_below else None

    def take_pages(self, pages: LayerPages) -> None:
        """Replace the keys and values that were waiting."""
        self._pages, self._dense, self.valid = pages, None, None

    def finish(self) -> None:
        """End of a step: commit what waited for sharing layers; a prompt has arrived on the host when this returns."""
        if self._pages is not None:
            self._pages.settle()
        elif self.waiting(self._length) is not None:
            msg = f"layer {self.layer_idx}: not all of layers {self.members}, which share pages, attend; set reuse=1"
            raise UnsupportedModelError(msg)
        if self._deferred is not None and self._pages is not None:
            (keys, values), valid = self._deferred
            self._deferred = None
            self._pages.append(keys, values, valid)
        self._before_chunk, self._sent = None, False
        self.may_be_shared = self._shared_call

    def roll_back(self, length: int) -> None:
        """Undo an unfinished step: be `length` positions long again."""
        self._staged = self._before_chunk = self._last = self._deferred = None
        self._sent = False
        if self._pages is not None:
            self._pages.settle(check=False)
        if length == 0:
            self._forget()
            return
        if isinstance(self._pages, LayerPages):
            self._pages.drop_unrecorded()
        self._length = self._pages.padding.n_positions if self._pages is not None else self._dense_length()
        if self._length > length:
            self._cut(self._length - length)
        assert self._length == length, f"layer {self.layer_idx}: rolled back to {self._length}, not {length}"

    def _dense_length(self) -> int:
        return 0 if self._dense is None else self._dense[0].shape[-2]
