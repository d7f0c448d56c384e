"""One layer's KV cache under a mask policy: everything stays on the device, and a mask says what is attended."""

from __future__ import annotations

import numpy as np
import torch

from icecache.attention import Inside, Notes, masked_attention, read_prompt, whole_attention
from icecache.attention.mass import add_mass
from icecache.config import PAGE_TOKENS
from icecache.hf.cache import RetrievalLayer
from icecache.hf.call import Call
from icecache.hf.masks import prompt_padding
from icecache.hf.step import Engine, Sequence
from icecache.pages import LayerPages, WholeKV
from icecache.select import Chosen, MaskPolicy, StepView
from icecache.stats import TraceEvent


class PolicyLayer(RetrievalLayer):
    """A cache layer that keeps everything. Short layers are dense, as in every runtime, and take notes meanwhile.

    Invariant: `_pending` says that the state of the policy has still to be made from the notes and what is kept; that
    happens before the next token comes.
    """

    def _forget(self) -> None:
        super()._forget()
        self.notes = Notes()
        self._staged_notes: Notes | None = None
        self._pending = False
        self._n_tokens: list[int] | None = None

    @property
    def policy(self) -> MaskPolicy:
        """What masks."""
        assert self.engine.masks is not None
        return self.engine.masks

    def load(
        self, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor | None, notes: Notes | None = None
    ) -> None:
        """Fill an empty layer, see `RetrievalLayer.load`; `notes` were taken when these keys were made.

        Raises
        ------
        CacheStateError
            If the policy needs notes that there are not.
        """
        self.notes = notes or Notes()
        if not self.policy.always_dense:
            self.notes.check(self.policy.needs, self.policy.name)
        self._n_tokens = [keys.shape[2]] * keys.shape[0] if valid is None else valid.sum(1).tolist()
        super().load(keys, values, valid)

    def forked(self, engine: Engine, sequence: Sequence) -> RetrievalLayer:
        """Independent copy, see `RetrievalLayer.forked`."""
        new = super().forked(engine, sequence)
        assert isinstance(new, PolicyLayer)
        new.notes, new._pending, new._n_tokens = self.notes, self._pending, self._n_tokens
        return new

    def attend(self, call: Call) -> torch.Tensor:
        """Attend and commit, see `RetrievalLayer.attend`."""
        if not call.shared and (self._pages is None or call.query.shape[2] > 1):
            self._take_notes(call)
        return super().attend(call)

    def _take_notes(self, call: Call) -> None:
        """Note what the policy asks for; it counts once the step is over."""
        needs, short = self.policy.needs, self._pages is None
        valid = None
        if short and (call.query.shape[2] > 1 or needs.attention):
            valid = prompt_padding(self.layer_idx, call.mask, self._length)
        if short and self.policy.always_dense:
            self._count_dense(call, valid)
        if needs.last_queries or (needs.attention and short):
            notes = self._staged_notes or self.notes
            self._staged_notes = notes.after(needs, call.query, call.keys, valid, call.scaling, call.softcap)

    def _count_dense(self, call: Call, valid: torch.Tensor | None) -> None:
        """Charge a decode step that attends to everything."""
        if call.query.shape[2] > 1 or self._n_tokens is None:
            n_rows, n_keys = call.keys.shape[0], call.keys.shape[2]
            self._n_tokens = [n_keys] * n_rows if valid is None else valid.sum(1).tolist()
            return
        self._n_tokens = [n + 1 for n in self._n_tokens]
        services, n_heads = self.engine.services, call.keys.shape[1]
        services.recorder.attended(np.repeat(np.array(self._n_tokens)[:, None], n_heads, 1))
        n_queries = call.query.shape[0] * call.query.shape[1]
        add_mass(services, call.query.device, float(n_queries), n_queries)

    def _keep(self, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor | None) -> None:
        if self._length < self.engine.config.dense_below:
            self._dense = keys, values
            return
        self._pages = WholeKV.build(keys, values, valid)
        self._dense, self._pending = None, True

    def _attend_past(self, call: Call, mask: Inside) -> torch.Tensor:
        if self._pending:
            self._prepare(call)
        return super()._attend_past(call, mask)

    def _prepare(self, call: Call) -> None:
        """Make the policy's state from the notes and from what is kept."""
        whole, engine = self._whole(self._pages), self.engine
        self.notes.check(self.policy.needs, self.policy.name)
        prompt = read_prompt(whole, self.notes, self.layer_idx, engine.n_layers, call.scaling, call.softcap)
        whole.state, whole.index = self.policy.prepare(prompt), self.policy.prepare_index(whole.n_prompt)
        engine.services.charges.note(self.policy.describe(whole.state))
        self._pending, self.notes = False, Notes(self.notes.queries, None)

    @staticmethod
    def _whole(kept: LayerPages | WholeKV | None) -> WholeKV:
        assert isinstance(kept, WholeKV)
        return kept

    def _decode(self, kept: LayerPages | WholeKV, call: Call, query: torch.Tensor) -> torch.Tensor:
        whole, engine = self._whole(kept), self.engine
        keys = whole.keys
        view = StepView(
            layer=self.layer_idx,
            n_layers=engine.n_layers,
            query=query.reshape(*keys.shape[:2], -1, query.shape[-1]).float(),
            keys=keys,
            lengths=whole.device_lengths(),
            n_prompt=whole.device_prompt(),
            state=whole.state,
            index=whole.index,
            shared=self.sequence.shared,
            scaling=call.scaling,
            softcap=call.softcap,
        )
        with engine.services.recorder.part("search"):
            chosen = self.policy.choose(view)
        with engine.services.recorder.part("attention"):
            out = masked_attention(engine.services, chosen, view, whole.values, call.sinks)
        if engine.services.trace is not None:
            engine.services.trace(self._event(whole, chosen, view))
        if chosen.state is not None:
            whole.state = dict(chosen.state)
        return out.to(query.dtype)

    def _event(self, whole: WholeKV, chosen: Chosen, view: StepView) -> TraceEvent:
        mask = (chosen.mask & view.valid[:, None, None]).expand(view.logits.shape).cpu().numpy()
        n_rows, n_heads = mask.shape[:2]
        return TraceEvent(
            layer=self.layer_idx,
            rows=tuple(range(n_rows)),
            lengths=tuple(whole.lengths),
            sink_tokens=(0,) * n_rows,
            window_start=tuple(whole.lengths),
            pages=np.zeros((n_rows, n_heads, 0), np.int64),
            positions=np.zeros((n_rows, n_heads, 0, PAGE_TOKENS), np.int32),
            attended=mask,
        )

    def _attend_chunk(self, kept: LayerPages | WholeKV, call: Call, mask: Inside) -> torch.Tensor:
        return whole_attention(
            self._whole(kept),
            call.query,
            call.keys,
            call.values,
            mask,
            scaling=call.scaling,
            softcap=call.softcap,
            sinks=call.sinks,
        )

    def _select(self, rows: list[int]) -> None:
        super()._select(rows)
        self.notes = self.notes.select(rows)
        if self._n_tokens is not None:
            self._n_tokens = [self._n_tokens[b] for b in rows]

    def _cut(self, n_positions: int) -> None:
        if self._dense is not None:
            self.notes = self.notes.crop(n_positions)
            self._n_tokens = None if self._n_tokens is None else [max(n - n_positions, 0) for n in self._n_tokens]
        super()._cut(n_positions)

    def finish(self) -> None:
        """End of a step: what was noted counts, and a chunk that was attended exactly belongs to the prompt."""
        exact_chunk = self._deferred is not None
        super().finish()
        if self._staged_notes is not None:
            self.notes, self._staged_notes = self._staged_notes, None
        if exact_chunk:
            self._whole(self._pages).extend_prompt()
            self._pending = True

    def roll_back(self, length: int) -> None:
        """Undo an unfinished step, its notes included."""
        self._staged_notes = None
        super().roll_back(length)
