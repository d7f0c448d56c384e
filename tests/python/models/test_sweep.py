"""Every decoder class of the installed transformers: identical with retrieval in use, dense by request, or refused.

The list is printed in the terminal summary. "Identical" compares the logits of a prompt, of decode steps, of a later
chunk and of more decode steps with those of the plain model.
"""

from __future__ import annotations

import re

import pytest
import torch
from icecache import IceRuntime, UnsupportedModelError
from shrink import build_tiny
from transformers import DynamicCache
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING


def _classes() -> list[tuple[type, type]]:
    rows = set()
    for config_class, models in MODEL_FOR_CAUSAL_LM_MAPPING.items():
        rows |= {(config_class, model) for model in (models if isinstance(models, tuple) else (models,))}
    return sorted(rows, key=lambda row: (row[1].__name__, row[0].__name__))


CLASSES = _classes()
# Families that must be served, or a runtime that refuses everything would pass.
SERVED = {
    *("Exaone4ForCausalLM", "GPT2LMHeadModel", "GPTNeoXForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM"),
    *("Glm4ForCausalLM", "GptOssForCausalLM", "GraniteForCausalLM", "LlamaForCausalLM", "MixtralForCausalLM"),
    *("OPTForCausalLM", "Phi3ForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"),
    "SmolLM3ForCausalLM",
}
PROMPT, CHUNK, LENGTH = 70, (76, 90), 96
# Rounding decides where a router sees two experts alike: one such token had a margin of 5e-6, where .8 is usual, and
# its logits changed by a fifth. Wrong attention shows at many tokens.
ROUTES, ALLOWED_TIES = re.compile("router|expert|moe", re.IGNORECASE), 1


def teacher_forced(model, ids: torch.Tensor, cache) -> torch.Tensor:
    """Logits of all positions: prompt, decode steps, a later chunk, decode steps."""
    cuts = [(0, PROMPT), *((i, i + 1) for i in range(PROMPT, CHUNK[0])), CHUNK]
    cuts += [(i, i + 1) for i in range(CHUNK[1], LENGTH)]
    with torch.no_grad():
        return torch.cat([model(ids[:, a:b], past_key_values=cache, use_cache=True).logits for a, b in cuts], 1)


def outcome_of(model, ids: torch.Tensor, expected: torch.Tensor, on_unsupported: str) -> str:
    """Run the wrapped model; "identical", "dense" or a refusal with its reason. A wrong result fails the test."""
    try:
        with IceRuntime.wrap(model, budget=4096, dense_below=0, threads=1, on_unsupported=on_unsupported) as runtime:
            got = teacher_forced(model, ids, runtime.new_cache())
            pages = runtime.stats().pages_read
    except UnsupportedModelError as error:
        return f"refused: {error}"
    errors = (got - expected).abs().amax(-1) / expected.abs().max()
    routes = any(ROUTES.search(type(module).__name__) for module in model.modules())
    n_off = int((errors > 1e-4).sum())
    message = f"logits of {n_off} tokens differ, by {errors.max():.1e} of the largest"
    assert n_off <= (ALLOWED_TIES if routes else 0), message
    return f"identical, {pages} pages read" if pages else "dense"


def _tiny(config_class, model_class, ids):
    """Tiny model and its logits, or the reason why there is none."""
    try:
        model = build_tiny(config_class, model_class)
        logits = teacher_forced(model, ids, DynamicCache(config=model.config.get_text_config(decoder=True)))
    except Exception as error:  # whatever transformers does with a shrunken config
        return None, None, f"{type(error).__name__}: {error}"
    return (model, logits, "") if logits.isfinite().all() else (None, None, "its logits are not finite")


NAMES = [f"{model_class.__name__}-{config_class.__name__}" for config_class, model_class in CLASSES]


@pytest.mark.parametrize(("config_class", "model_class"), CLASSES, ids=NAMES)
def test_a_decoder_class_is_served_exactly_or_refused(config_class, model_class, record_property):
    ids = torch.randint(3, 95, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    model, expected, reason = _tiny(config_class, model_class, ids)
    if model is None:
        assert model_class.__name__ not in SERVED, reason
        record_property("sweep", ("not built", reason))
        pytest.skip(f"no tiny model: {reason}")
    outcome = outcome_of(model, ids, expected, "error")
    if not outcome.startswith("refused"):
        record_property("sweep", ("identical" if outcome.startswith("identical") else "dense", outcome))
        assert outcome.startswith("identical"), "a model that is not refused must read pages"
        return
    assert model_class.__name__ not in SERVED, outcome
    by_request = outcome_of(model, ids, expected, "dense")
    record_property("sweep", ("refused", f"{outcome.removeprefix('refused: ')} | on_unsupported=dense: {by_request}"))
