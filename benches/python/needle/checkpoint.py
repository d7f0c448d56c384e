"""Write a trained model in transformers' format, and check that transformers computes the same."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from icecache.eval.needle.samples import make_rows
from icecache.eval.needle.vocabulary import BOS, EOS, PAD, VOCABULARY, build_tokenizer
from safetensors.torch import load_file, save_file

from needle.config import ModelShape
from needle.model import NORM_EPS, NeedleModel

if TYPE_CHECKING:
    from transformers import PretrainedConfig

FACTS = "training.json"


def transformers_config(shape: ModelShape) -> PretrainedConfig:
    """Build the configuration under which transformers loads the weights."""
    import transformers

    name = "Qwen3" if shape.arch == "qwen3" else "Llama"
    config = getattr(transformers, f"{name}Config")(
        vocab_size=len(VOCABULARY),
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.query_heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.max_positions,
        rms_norm_eps=NORM_EPS,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
    )
    config.architectures = [f"{name}ForCausalLM"]
    config.dtype = "bfloat16"
    return config


def save(model: NeedleModel, folder: Path, facts: dict[str, float]) -> None:
    """Write weights (bfloat16), configuration, tokenizer and the facts of the training."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: w.detach().to(torch.bfloat16).contiguous().cpu() for name, w in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    transformers_config(model.shape).save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    # The spelling that every supported version of transformers knows.
    fields = {**json.loads(settings.read_text()), "tokenizer_class": "PreTrainedTokenizerFast"}
    fields.pop("backend", None)
    settings.write_text(json.dumps(fields, indent=2) + "\n")
    (folder / FACTS).write_text(json.dumps({"shape": asdict(model.shape), **facts}, indent=1) + "\n")


def load(folder: Path, device: torch.device) -> NeedleModel:
    """Load what `save` wrote, as float32."""
    shape = ModelShape(**json.loads((folder / FACTS).read_text())["shape"])
    model = NeedleModel(shape)
    weights = {name: weight.float() for name, weight in load_file(folder / "model.safetensors").items()}
    model.load_state_dict(weights)
    return model.to(device).eval()


@torch.no_grad()
def parity(folder: Path, device: torch.device) -> float:
    """Largest difference of logits between this code and transformers on two rows of 256 tokens, both float32."""
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    ours = load(folder, device)
    tokens = make_rows("kv32", 256, 2, seed=5).tokens.to(device)
    return float((ours.logits(ours.hidden(tokens)) - theirs(tokens).logits).abs().max())
