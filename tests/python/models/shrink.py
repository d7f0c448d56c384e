"""Make any decoder of transformers tiny by rewriting its default config. No model is named here."""

from __future__ import annotations

import re

import torch
from transformers import PreTrainedConfig, PreTrainedModel

HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 64, 4, 2, 16
MAX_LAYERS, MAX_PARAMETERS = 8, 20_000_000
RULES: list[tuple[str, object]] = [
    (r"(vocab_size|n_vocab|vocab_size_per_layer_input)", 99),
    (r"(hidden_size|d_model|n_embd|embed_dim|embedding_size|word_embed_proj_dim|dim|model_dim)", HIDDEN),
    (r"(hidden_size_per_layer_input|altup_.*dim)", 16),
    (r"(intermediate_size|ffn_dim|n_inner|d_ff|inner_dim|ffn_hidden_size|dim_ff|intermediate_size_mlp)", 96),
    (r"(moe_.*intermediate_size|shared_expert.*intermediate_size|expert_.*size|expert_dim|.*expert_ffn.*)", 32),
    (r"(num_attention_heads|n_head|n_heads|num_heads|decoder_attention_heads|attention_heads)", HEADS),
    (r"(num_key_value_heads|num_kv_heads|n_head_kv|multi_query_group_num)", KV_HEADS),
    (r"(head_dim|attention_head_dim|attention_head_size|head_size|kv_channels|d_kv|d_head)", HEAD_DIM),
    (r"(global_head_dim|swa_head_dim|v_head_dim|qk_nope_head_dim|swa_v_head_dim)", HEAD_DIM),
    (r"(q_lora_rank|o_lora_rank)", 32),
    (r"(kv_lora_rank)", 16),
    (r"(qk_rope_head_dim|rotary_dim)", HEAD_DIM),
    (r"(qk_head_dim)", 2 * HEAD_DIM),
    (r"(attn_layer_offset)", 1),
    (r"(attn_layer_period)", 2),
    (r"(mamba_d_ssm)", HIDDEN),
    (r"(n_mamba_heads)", HEADS),
    (r"(mamba_headdim)", HEAD_DIM),
    (r"(max_position_embeddings|n_positions|n_ctx|max_seq_len|seq_length|max_sequence_length)", 512),
    (r"(num_local_experts|num_experts|n_routed_experts|moe_num_experts|num_experts_.*total)", 4),
    (r"(num_experts_per_tok|num_experts_per_token|moe_topk|moe_k|top_k_experts|moe_top_k|num_selected_experts)", 2),
    (r"(n_group|topk_group|n_shared_experts|num_shared_experts|moe_num_shared_experts)", 1),
    (r"(sliding_window|attention_window_size|local_window_size|attention_chunk_size)", 16),
    (r"(mamba_n_heads|mamba_num_heads|linear_num_value_heads|linear_num_key_heads|lightning_heads)", 4),
    (r"(linear_key_head_dim|linear_value_head_dim|mamba_head_dim|mamba_d_head)", 16),
    (r"(mamba_d_state|mamba_state_dim|ssm_state_size|state_size)", 16),
    (r"(mamba_n_groups|n_groups|mamba_chunk_size)", 1),
    (r"(mamba_expand|expand)", 1),
    (r"(lru_width)", HIDDEN),
    (r"(index_n_heads|index_head_dim|index_topk)", 16),
    (r"(num_kv_shared_layers|num_nextn_predict_layers|num_mtp_layers|mtp_num_hidden_layers)", 0),
    (r"(pad_token_id)", 0),
    (r"(bos_token_id|decoder_start_token_id)", 1),
    (r"(eos_token_id|sep_token_id)", 2),
]
DEPTH = re.compile(r"(num_hidden_layers|n_layer|n_layers|num_layers|decoder_layers|num_decoder_layers)")
INITIALIZER = re.compile(r"(initializer_range|init_std|initializer_std|initializer_factor)")


FULL = ("full_attention", "attention", "hybrid")
RECURRENT = ("mamba", "linear", "conv", "recurrent")


def _layer_kinds(options: dict, depth: int) -> None:
    """Make the last layer one of full attention where the default has none among the first."""
    for name in ("layer_types", "layers_block_type"):
        kinds = options.get(name)
        if isinstance(kinds, list) and kinds and all(kind.startswith(RECURRENT) for kind in kinds[:depth]):
            options[name] = [*kinds[: depth - 1], "attention" if name == "layers_block_type" else "full_attention"]
    if options.get("attn_layer_indices"):
        options["attn_layer_indices"] = [depth - 1]


def _depth(options: dict) -> int:
    """Few layers, but one of full attention where the default has one among its first."""
    kinds = options.get("layer_types") or options.get("layers_block_type") or []
    full = [i for i, kind in enumerate(kinds[:MAX_LAYERS]) if kind in FULL]
    return full[0] + 1 if full and full[0] > 0 else 2


def _value(name: str, value: object, mha: bool) -> object:
    """New value of one field."""
    rule = next((new for pattern, new in RULES if re.fullmatch(pattern, name)), None)
    if value is None:
        default = {"head_dim": HEAD_DIM, "num_key_value_heads": HEADS, "num_experts_per_tok": 2, "n_routed_experts": 4}
        return default.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float, list)):
        return value
    if INITIALIZER.fullmatch(name):
        return value if "factor" in name else 0.2
    if isinstance(value, list):
        return [_value(name, v, mha) if isinstance(v, int) else v for v in value]
    if isinstance(value, int) and rule is not None:
        return HEADS if mha and name == "num_key_value_heads" else min(value, rule)
    if isinstance(value, int) and name.endswith(("token_id", "token_index")):
        return min(value, 98)
    return value


def shrink(options: dict) -> dict:
    """The same nested options, tiny."""
    options = {name: value for name, value in options.items() if isinstance(name, str)}
    depth = _depth(options)
    old_depth = next((v for k, v in options.items() if DEPTH.fullmatch(k) and isinstance(v, int)), None)
    mha = options.get("num_key_value_heads") == options.get("num_attention_heads")
    _layer_kinds(options, depth)
    for name, value in options.items():
        if DEPTH.fullmatch(name) and isinstance(value, int):
            options[name] = depth
        elif isinstance(value, dict) and value and all(str(key).isdigit() for key in value):
            per_layer = {key: v for key, v in value.items() if int(key) < depth}
            options[name] = {key: shrink(v) if isinstance(v, dict) else v for key, v in per_layer.items()}
        elif isinstance(value, dict):
            options[name] = value if name.startswith(("rope", "quantization")) else shrink(value)
        elif isinstance(value, list) and old_depth and len(value) == old_depth:
            options[name] = _value(name, value[:depth], mha)
        else:
            options[name] = _value(name, value, mha)
    return options


def build_tiny(config_class: type[PreTrainedConfig], model_class: type[PreTrainedModel]) -> PreTrainedModel:
    """A tiny model of this class, in evaluation mode; raises whatever transformers raises if the result is no model."""
    options = shrink(config_class().to_dict())
    for name in ("transformers_version", "architectures", "model_type"):
        options.pop(name, None)
    config = config_class.from_dict(options)
    text = config.get_text_config(decoder=True)
    if getattr(text, "vocab_size", 99) > 1000 or getattr(text, "hidden_size", HIDDEN) > 512:
        raise ValueError("the config did not shrink")
    with torch.device("meta"):
        try:
            size = sum(p.numel() for p in model_class(config).parameters())
        except AttributeError:  # a text model registered under the config of its multimodal family
            config = text
            size = sum(p.numel() for p in model_class(config).parameters())
    if size > MAX_PARAMETERS:
        raise ValueError(f"still {size} parameters")
    torch.manual_seed(0)
    return model_class(config).eval()
