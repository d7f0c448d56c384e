"""Tiny models with random weights, large enough to make attention matter, and the comparison all tests share."""

from __future__ import annotations

from collections.abc import Callable

import torch
from icecache import IceRuntime, RuntimeStats
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 97
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "initializer_range": 0.3,  # attention is peaked: reading the wrong tokens changes the output
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _gpt2() -> PreTrainedModel:
    size = {"n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 4096, "vocab_size": VOCABULARY}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return GPT2LMHeadModel(GPT2Config(**size, **tokens, initializer_range=0.3))


def _gemma3() -> PreTrainedModel:
    kinds = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    options = {**_COMMON, "num_hidden_layers": 4, "layer_types": kinds, "sliding_window": 24}
    return Gemma3ForCausalLM(Gemma3TextConfig(**options))


def recurrent() -> PreTrainedModel:
    """A model whose first layer has no keys; with random weights."""
    kinds = ["conv", "full_attention", "full_attention"]
    config = Lfm2Config(**{k: v for k, v in _COMMON.items() if k != "head_dim"}, layer_types=kinds)
    return Lfm2ForCausalLM(config).eval()


BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_COMMON)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**_COMMON, sliding_window=None)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_COMMON)),
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**_COMMON)),
    "gemma3": _gemma3,
    "gpt2": _gpt2,
}


def build(family: str, seed: int = 0) -> PreTrainedModel:
    """A tiny model in evaluation mode; the same one for the same seed."""
    torch.manual_seed(seed)
    model = BUILDERS[family]().eval()
    model.generation_config.eos_token_id = None  # random weights would stop at random
    return model


def prompt(n_rows: int, n_tokens: int, seed: int = 0) -> torch.Tensor:
    """Random token ids without special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (n_rows, n_tokens), generator=generator)


def left_padded(lengths: list[int], seed: int = 0) -> dict[str, torch.Tensor]:
    """A ragged batch as generate wants it."""
    ids = prompt(len(lengths), max(lengths), seed)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, : ids.shape[1] - length] = 0
        mask[row, ids.shape[1] - length :] = 1
    return {"input_ids": ids, "attention_mask": mask}


def dense_and_ours(
    model: PreTrainedModel, use: Callable[[PreTrainedModel], object], **settings: object
) -> tuple[object, object, RuntimeStats]:
    """Result of `use` on the plain model and on the wrapped one, with the statistics of the latter.

    The default settings cover every context of these tests and let retrieval start at the first token.
    """
    expected = use(model)
    options = {"budget": 4096, "dense_below": 0, "threads": 1, **settings}
    with IceRuntime.wrap(model, **options) as runtime:
        got = use(model)
        return expected, got, runtime.stats()
