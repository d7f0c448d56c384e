"""What a mask says about padding and causality, in the few forms a layer can meet.

Our own mask function gives plain causal layers None or the 2D padding mask once pages are in use, and the model's own
kind of mask before that. Anything else is a custom pattern: honoured exactly or refused, never guessed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from icecache.attention import Inside, causal
from icecache.errors import CacheStateError, UnsupportedModelError
from icecache.hf.step import Step, current_step

if TYPE_CHECKING:
    from icecache.hf.cache import RetrievalLayer
    from icecache.hf.call import Call


_ONE_TOKEN = Inside()
"""Mask of a decode step; made once because it is needed in every layer of every step."""


def allowed_4d(layer_idx: int, mask: torch.Tensor, length: int) -> torch.Tensor:
    """Bool (B or 1, Q, length) of a 4D mask.

    Raises
    ------
    UnsupportedModelError
        For per-head masks, additive biases, and masks over another length.
    """
    if mask.dim() != 4 or mask.shape[1] != 1 or mask.shape[3] != length:
        msg = (
            f"layer {layer_idx}: attention mask of shape {tuple(mask.shape)}; expected one mask for all heads over "
            f"{length} positions"
        )
        raise UnsupportedModelError(msg)
    if mask.dtype == torch.bool:
        return mask[:, 0]
    allowed = mask == 0
    masked = mask <= torch.finfo(mask.dtype).min / 2
    if not bool((allowed | masked).all()):  # sync: custom masks only
        msg = f"layer {layer_idx}: the attention mask adds a bias to the logits; only masking is supported"
        raise UnsupportedModelError(msg)
    return allowed[:, 0]


def prompt_padding(layer_idx: int, mask: torch.Tensor | None, length: int) -> torch.Tensor | None:
    """Which of the first `length` positions are tokens: bool (B, length) on the CPU, None: all.

    Parameters
    ----------
    mask : torch.Tensor or None
        The mask attention was called with; the 2D mask behind it is preferred when it is our own.
    """
    step = current_step()
    if mask is None or (step is not None and mask is step.causal_mask):
        padding = None if step is None else step.padding
        if padding is None:
            return None
        if padding.shape[1] != length:
            msg = f"layer {layer_idx}: attention_mask covers {padding.shape[1]} positions, the cache holds {length}"
            raise UnsupportedModelError(msg)
    elif mask.dim() == 2:
        padding = mask[:, -length:].bool()
    else:
        padding = allowed_4d(layer_idx, mask, length).any(1)
    padding = padding.cpu()  # sync: once per prompt
    return None if bool(padding.all()) else padding


def chunk_mask(layer: RetrievalLayer, call: Call) -> Inside:
    """Mask of the staged tokens against themselves; checks that nothing earlier is hidden from them.

    A single new token sees everything before it; a 2D mask is read once per step then, not once per layer: that waits
    for the device.
    """
    mask, device = call.mask, call.query.device
    n_queries, n_keys = call.query.shape[2], call.keys.shape[2]
    if n_keys == 1 and (mask is None or mask.dim() == 2):
        valid = None if mask is None else new_tokens(_step(), layer, mask)
        return _ONE_TOKEN if valid is None else Inside(valid)
    if mask is None:
        return Inside()
    if mask.dim() == 2:
        _check_past(layer, mask, layer.get_seq_length() - n_keys)
        return _padded_chunk(mask, n_keys)
    length = layer.get_seq_length()
    allowed = allowed_4d(layer.layer_idx, mask, length)
    past = length - n_keys
    assert layer.kept is not None
    known = layer.kept.padding.valid()[:, :past]
    if not bool((allowed[..., :past].cpu() == known[:, None]).all()):  # sync: custom masks only
        msg = f"layer {layer.layer_idx}: the attention mask hides earlier tokens from a later chunk"
        raise UnsupportedModelError(msg)
    own = allowed[..., past:]
    valid = own.any(1).expand(call.query.shape[0], -1).cpu()  # sync: custom masks only
    plain = bool((own == (causal(n_queries, n_keys, device) & valid[:, None].to(device))).all())
    return Inside(None if bool(valid.all()) else valid, None if plain else own)


def _padded_chunk(mask: torch.Tensor, n_keys: int) -> Inside:
    """Read a 2D mask, once a step: all layers are given the same one."""
    step = current_step()
    if step is not None and step.chunk is not None and step.chunk[0] is mask and step.chunk[1] == n_keys:
        return Inside(step.chunk[2])
    valid = mask[:, -n_keys:].bool().cpu()  # sync: once per chunk
    known = None if bool(valid.all()) else valid
    if step is not None:
        step.chunk = mask, n_keys, known
    return Inside(known)


def _step() -> Step:
    step = current_step()
    assert step is not None
    return step


def new_tokens(step: Step, layer: RetrievalLayer, mask: torch.Tensor) -> torch.Tensor | None:
    """Say which new positions of a decode step are tokens: bool (B, 1) on the CPU, None: all.

    The newest position of a row can be padding (a shorter second turn). Of the past only the number of tokens is
    compared with what is stored: O(rows) to copy, whatever the length.

    Parameters
    ----------
    mask : torch.Tensor
        (B, positions), the new one included.

    Raises
    ------
    CacheStateError
        If the mask contradicts earlier ones.
    """
    pages = layer.kept
    assert pages is not None
    if not step.past_checked:
        step.past_checked = True
        mask = mask.bool()
        past, new = torch.stack([mask[:, :-1].sum(1), mask[:, -1].long()]).tolist()  # sync: once per step, if padded
        known = [pages.length(b) for b in range(pages.n_rows)]
        if mask.shape[1] != pages.padding.n_positions + 1 or past != known:
            raise _contradiction(mask, pages.padding.n_positions)
        step.new_valid = None if all(new) else torch.tensor(new, dtype=torch.bool)[:, None]
    return step.new_valid


def _check_past(layer: RetrievalLayer, mask: torch.Tensor, n_past: int) -> None:
    """Raise if a 2D mask contradicts what earlier masks said; once per step, padding is the same for all layers.

    Padding was never stored and tokens cannot be hidden later, so a mask that changes its mind would be silently
    ignored. generate() infers such a mask when it is given none and the text contains the padding token.
    """
    step = current_step()
    if step is None or step.past_checked:
        return
    step.past_checked = True
    assert layer.kept is not None
    known = layer.kept.padding.valid()[:, :n_past]
    now = mask[:, :n_past].bool().cpu()  # sync: once per chunk
    if mask.shape[1] != layer.get_seq_length() or not torch.equal(known, now):
        raise _contradiction(mask, n_past)


def _contradiction(mask: torch.Tensor, n_past: int) -> CacheStateError:
    return CacheStateError(
        f"attention_mask {tuple(mask.shape)} disagrees with the masks of earlier steps about the first {n_past} "
        "positions; pass attention_mask explicitly, the earlier one extended by the new tokens"
    )
