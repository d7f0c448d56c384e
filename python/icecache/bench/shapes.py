"""Models of well-known shapes with random weights: speed does not depend on what the weights are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from icecache.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of a decoder, as its config names them."""

    family: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rope_theta: float

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values of one token in bfloat16."""
        return 4 * self.num_hidden_layers * self.num_key_value_heads * self.head_dim


SHAPES = {
    "llama-3.1-8b": Shape("llama", 4096, 14336, 32, 32, 8, 128, 128256, 5e5),
    "mistral-7b": Shape("mistral", 4096, 14336, 32, 32, 8, 128, 32768, 1e6),
    "longchat-7b": Shape("llama", 4096, 11008, 32, 32, 32, 128, 32000, 1e4),
    "qwen3-4b": Shape("qwen3", 2560, 9728, 36, 32, 8, 128, 151936, 1e6),
    "qwen3-32b": Shape("qwen3", 5120, 25600, 64, 64, 8, 128, 151936, 1e6),
    "tiny": Shape("llama", 256, 512, 4, 8, 2, 64, 1024, 1e4),
}
"""From the public configs of Llama-3.1-8B, Mistral-7B-v0.3, LongChat-7B, Qwen3-4B and Qwen3-32B; "tiny" is ours."""


def random_model(name: str, device: torch.device, dtype: torch.dtype, *, max_tokens: int, seed: int) -> PreTrainedModel:
    """Model of a named shape.

    Parameters
    ----------
    name : str
        A key of `SHAPES`.
    max_tokens : int
        Longest context it must accept.
    seed : int
        Of the weights, which are normal with deviation .02; norms are 1.

    Raises
    ------
    ConfigError
        If there is no such shape.
    """
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        MistralConfig,
        MistralForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
    )

    if name not in SHAPES:
        msg = f"shape must be one of {', '.join(SHAPES)}, got {name!r}"
        raise ConfigError(msg)
    shape = SHAPES[name]
    config_type, model_type = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "mistral": (MistralConfig, MistralForCausalLM),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    }[shape.family]
    sizes = {field: getattr(shape, field) for field in Shape.__dataclass_fields__ if field not in ("family",)}
    theta = sizes.pop("rope_theta")
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    options = {"sliding_window": None} if shape.family == "mistral" else {}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = config_type(**sizes, **rope, **options, **tokens, max_position_embeddings=max_tokens)
    with torch.device("meta"):
        model = model_type(config)
    model = model.to(dtype).to_empty(device=device)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.02, generator=generator)
            else:
                parameter.fill_(1)
        _restore_buffers(model, device)
    model.generation_config.eos_token_id = None
    return model.eval()


def _restore_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Compute the rotary frequencies anew: `to_empty` left them undefined."""
    for module in model.modules():
        if hasattr(module, "inv_freq"):
            fresh = type(module)(module.config)
            for name, buffer in fresh.named_buffers():
                setattr(module, name, buffer.to(device))
