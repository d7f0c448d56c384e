"""What to train and how: the model's shape, the plan, and two presets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Arch = Literal["llama", "qwen3"]

# Shares of the rows; "mqar" comes on top during warm-up, because it makes induction heads form.
MIXTURE = {
    "mqar": 0.06,
    "induct": 0.06,
    "kv": 0.32,
    "passkey": 0.06,
    "vt": 0.16,
    "fwe": 0.07,
    "gsm": 0.16,
    "chase": 0.11,
}
WARM_UP_RECALL = 0.7


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Shape of the model; field names of transformers in brackets.

    Parameters
    ----------
    arch : {"llama", "qwen3"}, default="llama"
        Qwen3 adds a norm to queries and keys.
    layers, hidden, intermediate : int
        [num_hidden_layers, hidden_size, intermediate_size].
    query_heads, kv_heads, head_dim : int
        [num_attention_heads, num_key_value_heads, head_dim].
    max_positions : int
        [max_position_embeddings]; position jumps in training reach up to here.
    rope_theta : float, default=5e5
        Base of the rotary embedding.
    embedding_std : float, default=0.05
        Of the initial embeddings.
    """

    arch: Arch = "llama"
    layers: int
    hidden: int
    intermediate: int
    query_heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    rope_theta: float = 500_000.0
    embedding_std: float = 0.05

    def __post_init__(self) -> None:
        if self.query_heads % self.kv_heads:
            msg = f"query_heads must be a multiple of kv_heads={self.kv_heads}, got {self.query_heads}"
            raise ValueError(msg)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How to train.

    Parameters
    ----------
    minutes : float
        Wall clock of training, evaluation excluded.
    seed : int, default=0
        Of weights and data.
    tokens_per_step : int
        Rows times length; a quarter up to length 256 and a half up to 1024 when `small_early_batches`.
    small_early_batches : bool
        More and smaller steps while rows are short.
    stages : tuple of (int, float)
        Row length and share of the time.
    warm_up_steps : int
        Steps with extra associative recall.
    muon_lr, adam_lr : float
        Learning rates of hidden matrices and of everything else. Muon at .02 stalls with 6 layers.
    decay : float, default=0.35
        Last share of the time, in which both rates fall linearly.
    lm_weight : float, default=0.1
        Weight of the language-model loss on random tokens beside the answers' loss.
    jump_share : float, default=0.4
        Share of rows with PoSE position jumps.
    advance_at : float, default=0.93
        Smoothed accuracy at which a stage may end early.
    eval_lengths : tuple of int
        Lengths of the final table.
    """

    minutes: float
    seed: int = 0
    tokens_per_step: int
    small_early_batches: bool
    stages: tuple[tuple[int, float], ...]
    warm_up_steps: int
    muon_lr: float = 0.0025
    adam_lr: float = 3e-3
    decay: float = 0.35
    lm_weight: float = 0.1
    jump_share: float = 0.4
    advance_at: float = 0.93
    eval_lengths: tuple[int, ...] = field(default=(512,))


def gpu_preset(minutes: float) -> tuple[ModelShape, Plan]:
    """Shape and plan of the shipped model (one H100, 7.2 minutes)."""
    shape = ModelShape(
        layers=4, hidden=256, intermediate=512, query_heads=8, kv_heads=2, head_dim=64, max_positions=32768
    )
    shares = (0.10, 0.10, 0.10, 0.12, 0.13, 0.15, 0.15, 0.15)
    plan = Plan(
        minutes=minutes,
        tokens_per_step=131072,
        small_early_batches=True,
        stages=tuple((256 << stage, share) for stage, share in enumerate(shares)),
        warm_up_steps=300,
        eval_lengths=(512, 2048, 8192, 16384, 32768, 49152),
    )
    return shape, plan


def cpu_preset(minutes: float) -> tuple[ModelShape, Plan]:
    """Shape and plan of a smoke test: short rows, two narrow layers; the loss falls within a minute."""
    shape = ModelShape(
        layers=2, hidden=128, intermediate=256, query_heads=4, kv_heads=2, head_dim=32, max_positions=2048
    )
    plan = Plan(
        minutes=minutes,
        tokens_per_step=2048,
        small_early_batches=False,
        stages=((128, 1.0),),
        warm_up_steps=200,
        muon_lr=0.02,
        eval_lengths=(256,),
    )
    return shape, plan
