"""The protocol of a mask policy: a baseline that keeps all keys and values on the device and attends to some of them.

Dimension key: B rows, H KV heads, G query heads per KV head, T columns (tokens of the longest row), D head dim.

Three questions define a policy. What does it remember of the dense prefill (`prepare`)? What does it attend to at a
step (`choose`)? What does that cost (counted from the mask: tokens per query head, and their union per KV head)? The
numbers are those of the published method; the time is not, since all logits are computed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from icecache.pages import RowIndex


@dataclass(frozen=True, slots=True)
class Needs:
    """What a policy wants noted while a prompt is processed densely.

    Parameters
    ----------
    last_queries : int, default=0
        Queries of so many of the last prompt tokens.
    attention : bool, default=False
        For each key the softmax weight it got, summed over all queries of the prompt and over the query group.
    """

    last_queries: int = 0
    attention: bool = False


@dataclass(frozen=True, slots=True)
class Prompt:
    """One layer at the end of the dense prefill, padding removed: token t of a row is column t.

    Parameters
    ----------
    layer, n_layers : int
        Layer of the model, and how many there are.
    keys, values : torch.Tensor
        (B, H, T, D), post-RoPE.
    lengths : torch.Tensor
        int64 (B,).
    queries : torch.Tensor or None
        (B, H, G, w, D) float32: of the last w tokens; the last one is the newest. None: not asked for, or unknown.
    queries_valid : torch.Tensor or None
        Bool (B, w): False where the row is shorter than w.
    attention : torch.Tensor or None
        float32 (B, H, T), see `Needs`.
    scaling, softcap
        Of the logits.
    """

    layer: int
    n_layers: int
    keys: torch.Tensor
    values: torch.Tensor
    lengths: torch.Tensor
    queries: torch.Tensor | None
    queries_valid: torch.Tensor | None
    attention: torch.Tensor | None
    scaling: float
    softcap: float | None

    @property
    def columns(self) -> torch.Tensor:
        """``0 .. T - 1`` on the device."""
        return torch.arange(self.keys.shape[2], device=self.keys.device)

    @property
    def valid(self) -> torch.Tensor:
        """Bool (B, T): columns that hold a token."""
        return self.columns < self.lengths[:, None]


@dataclass(slots=True)
class StepView:
    """One decode step of one layer. The newest token is already there: column ``lengths - 1``.

    Parameters
    ----------
    query : torch.Tensor
        (B, H, G, D) float32, post-RoPE.
    keys : torch.Tensor
        (B, H, T, D) in the model's dtype.
    lengths, n_prompt : torch.Tensor
        int64 (B,): tokens, and those of the dense prefill.
    state : mapping of str to torch.Tensor
        What `prepare` returned, or the last `Chosen.state`.
    index : object or None
        What `prepare_index` returned.
    shared : dict of str to torch.Tensor
        One for all layers of a cache: how layers of one step tell each other something.
    """

    layer: int
    n_layers: int
    query: torch.Tensor
    keys: torch.Tensor
    lengths: torch.Tensor
    n_prompt: torch.Tensor
    state: Mapping[str, torch.Tensor]
    index: object | None
    shared: dict[str, torch.Tensor]
    scaling: float
    softcap: float | None
    _cached: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def columns(self) -> torch.Tensor:
        """``0 .. T - 1`` on the device."""
        if "columns" not in self._cached:
            self._cached["columns"] = torch.arange(self.keys.shape[2], device=self.keys.device)
        return self._cached["columns"]

    @property
    def valid(self) -> torch.Tensor:
        """Bool (B, T): columns that hold a token, the newest one included."""
        return self.columns < self.lengths[:, None]

    @property
    def newest(self) -> torch.Tensor:
        """Bool (B, T): the newest token."""
        return self.columns == self.lengths[:, None] - 1

    @property
    def logits(self) -> torch.Tensor:
        """Scaled logits (B, H, G, T), float32; -inf where a column holds no token."""
        if "logits" not in self._cached:
            logits = capped(torch.matmul(self.query * self.scaling, self.keys.float().transpose(-1, -2)), self.softcap)
            self._cached["logits"] = logits.masked_fill(~self.valid[:, None, None], float("-inf"))
        return self._cached["logits"]

    def sink_and_window(self, n_sink: int, n_window: int) -> torch.Tensor:
        """Bool (B, T): the first `n_sink` tokens, the newest one, and the `n_window` before it."""
        recent = self.columns >= self.lengths[:, None] - 1 - n_window
        return ((self.columns < n_sink) | recent) & self.valid

    def generated(self) -> torch.Tensor:
        """Bool (B, T): tokens that came after the dense prefill."""
        return (self.columns >= self.n_prompt[:, None]) & self.valid


@dataclass(frozen=True, slots=True)
class Chosen:
    """What a step attends to.

    Parameters
    ----------
    mask : torch.Tensor
        Bool, broadcastable to (B, H, G, T).
    bias : torch.Tensor or None
        float32, broadcastable to (B, H, G, T): added to the logits.
    weights : torch.Tensor or None
        float32 (B, H, G, T): taken instead of the softmax over `mask`.
    state : mapping or None
        The policy's state after this step; None: unchanged.
    dense : bool
        The layer attends to everything by design: it is listed as dense and not counted.
    """

    mask: torch.Tensor
    bias: torch.Tensor | None = None
    weights: torch.Tensor | None = None
    state: Mapping[str, torch.Tensor] | None = None
    dense: bool = False


class MaskPolicy(Protocol):
    """A baseline. Frozen: everything that changes is in the state of a layer."""

    @property
    def name(self) -> str:
        """Name under which it is run and reported."""
        ...

    @property
    def needs(self) -> Needs:
        """What has to be noted during the dense prefill."""
        ...

    @property
    def forgets(self) -> bool:
        """Whether the published method drops tokens for good: later chunks then go token by token."""
        ...

    @property
    def generated_kept(self) -> str:
        """What becomes of generated tokens: "all" stay attended, "indexed" like the prompt, "window", "scored"."""
        ...

    @property
    def always_dense(self) -> bool:
        """Whether nothing is ever masked: layers stay short then, with the model's own attention."""
        ...

    def own_dense_layers(self, n_layers: int) -> tuple[int, ...]:
        """Layers that the method itself keeps dense, beside those of the config."""
        ...

    def prepare(self, prompt: Prompt) -> dict[str, torch.Tensor]:
        """State at the end of the dense prefill; axis 0 of every tensor is the row."""
        ...

    def prepare_index(self, lengths: Sequence[int]) -> RowIndex | None:
        """State that is not made of tensors, for prompts of these lengths; it becomes `StepView.index`."""
        ...

    def describe(self, state: dict[str, torch.Tensor]) -> dict[str, float]:
        """Numbers worth reporting about a state, such as tuned parameters."""
        ...

    def choose(self, view: StepView) -> Chosen:
        """Say what this step attends to."""
        ...


class Baseline:
    """Answers that most policies give."""

    @property
    def needs(self) -> Needs:
        """Nothing."""
        return Needs()

    @property
    def forgets(self) -> bool:
        """No."""
        return False

    @property
    def generated_kept(self) -> str:
        """Treated like prompt tokens."""
        return "indexed"

    @property
    def always_dense(self) -> bool:
        """No."""
        return False

    def own_dense_layers(self, n_layers: int) -> tuple[int, ...]:  # noqa: ARG002
        """None."""
        return ()

    def prepare(self, prompt: Prompt) -> dict[str, torch.Tensor]:  # noqa: ARG002
        """Nothing to remember."""
        return {}

    def prepare_index(self, lengths: Sequence[int]) -> RowIndex | None:  # noqa: ARG002
        """None."""
        return None

    def describe(self, state: dict[str, torch.Tensor]) -> dict[str, float]:  # noqa: ARG002
        """Nothing to report."""
        return {}


def capped(logits: torch.Tensor, softcap: float | None) -> torch.Tensor:
    """``softcap * tanh(logits / softcap)``, or the logits themselves."""
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def best(scores: torch.Tensor, allowed: torch.Tensor, k: int, *, first_wins: bool = False) -> torch.Tensor:
    """Mark the `k` best of the last axis among the `allowed` ones (all of them where they are fewer).

    Parameters
    ----------
    scores : torch.Tensor
        (..., n), any float dtype.
    allowed : torch.Tensor
        Bool, broadcastable to the same shape.
    k : int
        0 or less: none.
    first_wins : bool, default=False
        Among equal scores the earlier column is taken; slower. Otherwise that is left to torch.

    Returns
    -------
    torch.Tensor
        Bool (..., n).
    """
    allowed = allowed.expand(scores.shape)
    none = torch.zeros_like(allowed)
    if k <= 0:
        return none
    scores = scores.masked_fill(~allowed, float("-inf"))
    if first_wins:
        top = scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    else:
        top = scores.topk(min(k, scores.shape[-1]), dim=-1, sorted=False).indices
    return none.scatter(-1, top, value=True) & allowed


def group_weight(logits: torch.Tensor) -> torch.Tensor:
    """Logarithm of the softmax weights of a query group, summed: (B, H, G, T) becomes (B, H, 1, T).

    The logarithm, because weights below 1e-38 would all be equal. NaN where nothing is live.
    """
    return torch.logsumexp(torch.log_softmax(logits, -1), 2, keepdim=True)


def in_pages(tensor: torch.Tensor, axis: int, page_tokens: int, fill: float) -> torch.Tensor:
    """Cut the column axis into pages: (..., T, ...) becomes (..., pages, page_tokens, ...), the last page filled up."""
    missing = -tensor.shape[axis] % page_tokens
    if missing:
        shape = list(tensor.shape)
        shape[axis] = missing
        tensor = torch.cat([tensor, tensor.new_full(shape, fill)], axis)
    cut = tensor.shape
    return tensor.reshape(*cut[:axis], -1, page_tokens, *cut[axis + 1 :])


def of_pages(marked: torch.Tensor, page_tokens: int, n_columns: int) -> torch.Tensor:
    """Columns of marked pages: bool (..., pages) becomes (..., n_columns)."""
    return marked.repeat_interleave(page_tokens, dim=-1)[..., :n_columns]
