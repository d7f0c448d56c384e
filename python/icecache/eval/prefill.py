"""One dense prefill of a batch, and every arm's own continuation of it.

Arms whose pages are cut alike share one index: the first of them builds it, the others fork it. An arm whose steps are
CUDA graphs packs its own.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import torch

from icecache.config import IceConfig
from icecache.eval.arms import DENSE, Arm, arm_config
from icecache.eval.greedy import prefill_tokens
from icecache.eval.record import ArmStats, Setup, finite
from icecache.eval.render import Prompt
from icecache.hf.cache import RetrievalLayer
from icecache.hf.names import cache_argument
from icecache.policies import Prefill, make_policy
from icecache.runtime import IceRuntime

if TYPE_CHECKING:
    from transformers import Cache, PreTrainedModel

# Policies that read the same pages: they differ in how these are chosen.
SHARED_PAGES: Final = frozenset({"icecache", "page-oracle", "random"})
# Those of them that a runtime would run as CUDA graphs.
CAPTURED: Final = frozenset({"icecache"})
# Scores of one chunk of an eager prefill: batch x query heads x chunk x context, in float32.
EAGER_BYTES: Final = 1 << 30


@dataclass(slots=True)
class Prefilled:
    """A batch whose prompts are in a cache.

    Parameters
    ----------
    prompts : list of Prompt
        The rows.
    setup : {"A", "B"}
        What the cache holds.
    cache : Cache
        Dense, with what policies noted of the prompt; no arm changes it.
    seconds : float
        The prefill took so long.
    pages : dict
        Cache with pages, and the seconds it took to make it, by how pages are cut.
    """

    prompts: Sequence[Prompt]
    setup: Setup
    cache: Cache
    seconds: float
    pages: dict[tuple[object, ...], tuple[Cache, float]] = field(default_factory=dict)

    @property
    def n_tokens(self) -> int:
        """Longest sequence that can come of it."""
        return max(prompt.n_most for prompt in self.prompts)


@torch.inference_mode()
def prefill(
    model: PreTrainedModel,
    prompts: Sequence[Prompt],
    setup: Setup,
    *,
    bare: bool = False,
    notes: Prefill | None = None,
) -> Prefilled:
    """Process the contexts of a batch with the model's own dense attention.

    Parameters
    ----------
    model : PreTrainedModel
        Not wrapped.
    prompts : sequence of Prompt
        One batch, of one shape.
    setup : {"A", "B"}
        Whether the question is part of it.
    bare : bool, default=False
        Leave the context out ("no-context"); the question comes token by token.
    notes : Prefill or None, default=None
        What to note for the policies that will take the cache over; None: nothing.
    """
    from transformers import DynamicCache

    began = time.perf_counter()
    rows = [prompt.bare if bare else prefill_tokens(prompt, setup) for prompt in prompts]
    with contextlib.ExitStack() as stack:
        stack.enter_context(ready_kernels(model))
        if notes is None:
            cache = DynamicCache(config=model.config)
        else:
            cache = stack.enter_context(IceRuntime.wrap(model, policy=notes)).new_cache()
        if rows[0]:
            tokens = torch.tensor(rows, device=model.device)
            # The logits of a context are never read; one row of them instead of thousands.
            model(input_ids=tokens, use_cache=True, logits_to_keep=1, **cache_argument(cache))
        synchronize(model)
    return Prefilled(prompts, "B" if bare else setup, cache, time.perf_counter() - began)


def what_to_note(arms: Sequence[Arm], base: IceConfig) -> Prefill | None:
    """Say what a prefill has to note for these arms; None: nothing.

    Parameters
    ----------
    arms : sequence of Arm
        Those that will take the cache over.
    base : IceConfig
        Settings all arms share.
    """
    policies = [make_policy(arm.runs, arm_config(arm, base)) for arm in arms if arm.policy not in DENSE]
    needs = [policy.masks.needs for policy in policies if policy.masks is not None]
    if not any(need.last_queries or need.attention for need in needs):
        return None
    return Prefill(max(need.last_queries for need in needs), any(need.attention for need in needs))


def plain_copy(cache: Cache, model: PreTrainedModel) -> Cache:
    """Copy a dense cache, ours or transformers' own, into one that the bare model takes."""
    from transformers import DynamicCache

    copied = DynamicCache(config=model.config)
    for i, layer in enumerate(cache.layers):
        if not isinstance(layer, RetrievalLayer):
            copied.layers[i] = copy.deepcopy(layer)
        elif (pair := layer.dense_pair()) is not None:
            copied.layers[i].update(*(tensor.clone() for tensor in pair))
    return copied


@torch.inference_mode()
def prefill_eagerly(model: PreTrainedModel, prompts: Sequence[Prompt], setup: Setup) -> Prefilled:
    """Prefill with the eager attention kernel, in chunks so that its scores fit into memory."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    began = time.perf_counter()
    tokens = torch.tensor([prefill_tokens(prompt, setup) for prompt in prompts], device=model.device)
    n_heads = model.config.get_text_config().num_attention_heads
    chunk = max(1, EAGER_BYTES // (4 * len(tokens) * n_heads * tokens.shape[1]))
    for start in range(0, tokens.shape[1], chunk):
        piece = tokens[:, start : start + chunk]
        model(input_ids=piece, use_cache=True, logits_to_keep=1, **cache_argument(cache))
    synchronize(model)
    return Prefilled(prompts, setup, cache, time.perf_counter() - began)


def synchronize(model: PreTrainedModel) -> None:
    """Wait for the model's device, so that times are those of the work."""
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)


@contextmanager
def ready_kernels(model: PreTrainedModel) -> Iterator[None]:
    """Keep PyTorch from cuDNN's attention inside the block: it plans anew for every length, that is in every step.

    On one H100 a step of full attention took 70 to 90 ms that way, and as much over nine tokens as over 16,384.
    """
    if model.device.type != "cuda":
        yield
        return
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        yield


@contextmanager
def attention_kernel(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Attend with another kernel inside the block."""
    before = model.config._attn_implementation
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@dataclass(slots=True)
class Session:
    """An arm at work: its own cache, and what it read."""

    cache: Cache
    adopt_s: float = 0.0
    runtime: IceRuntime | None = None

    def stats(self, n_first: int, n_steps: int, rows: int, ttft_s: float, tpot_s: float) -> ArmStats:
        """Accounting so far.

        Parameters
        ----------
        n_first : int
            Tokens in the cache before the first step.
        n_steps : int
            Steps since.
        rows : int
            Rows of the batch.
        ttft_s, tpot_s : float
            As in the record.
        """
        if self.runtime is None:
            attended = n_first + (n_steps + 1) / 2
            return ArmStats(attended, attended, 0, 0, 1.0, ttft_s, tpot_s, generated_kept="all", rows=rows)
        seen = self.runtime.stats()
        return ArmStats(
            attended=seen.attended_mean,
            loaded=seen.loaded_mean,
            pages=seen.pages_read,
            bytes=seen.bytes_to_device,
            mass=finite(seen.mass_kept),
            ttft_s=ttft_s,
            tpot_s=tpot_s,
            dense_layers=seen.dense_layers,
            generated_kept=seen.generated_kept,
            parameters=dict(seen.parameters),
            rows=rows,
        )


@contextmanager
def attend(model: PreTrainedModel, arm: Arm, base: IceConfig, prefilled: Prefilled) -> Iterator[Session]:
    """Make the model attend the arm's way; leaving undoes it. `prefilled` stays as it was, for the next arm.

    Parameters
    ----------
    model : PreTrainedModel
        Not wrapped.
    arm : Arm
        Which.
    base : IceConfig
        Settings of the arm but for its budget.
    prefilled : Prefilled
        The batch; for "no-context" and "full-eager" made for this arm.
    """
    if arm.policy in DENSE:
        name = "eager" if arm.policy == "full-eager" else model.config._attn_implementation
        with attention_kernel(model, name), ready_kernels(model):
            yield Session(plain_copy(prefilled.cache, model))
        return
    config = arm_config(arm, base, prefilled.n_tokens)
    source, build_s = _source(model, arm.runs, config, prefilled)
    with ready_kernels(model), IceRuntime.wrap(model, config, policy=arm.runs) as runtime:
        began = time.perf_counter()
        cache = runtime.adopt(source)
        yield Session(cache, build_s + time.perf_counter() - began, runtime)


def _source(model: PreTrainedModel, policy: str, config: IceConfig, prefilled: Prefilled) -> tuple[Cache, float]:
    """Cache to take over: pages where policies share them, else the dense one."""
    # A graph on a GPU wants pages of its own runtime, in memory that this runtime has page-locked.
    captured = model.device.type == "cuda" and config.decode == "auto" and policy in CAPTURED
    if policy not in SHARED_PAGES or captured:
        return prefilled.cache, 0.0
    cut = (config.sink_tokens, config.window, config.dense_layers, config.dense_below)
    if cut not in prefilled.pages:
        with IceRuntime.wrap(model, config, policy=policy) as runtime:
            began = time.perf_counter()
            paged = runtime.adopt(prefilled.cache)
            prefilled.pages[cut] = paged, time.perf_counter() - began
    return prefilled.pages[cut]
