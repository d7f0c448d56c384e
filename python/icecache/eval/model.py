"""The model under test: its tokenizer first, which all checks need, its weights last."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from icecache.errors import ConfigError, DataError
from icecache.eval.machine import model_sha256
from icecache.eval.needle.model import load_needle, needle_path, without_progress_bar
from icecache.eval.options import SHIPPED

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model comes from, and what of it is needed before its weights.

    Parameters
    ----------
    name : str
        As given.
    path : str
        What `from_pretrained` takes.
    tokenizer : PreTrainedTokenizerBase
        Its tokenizer.
    n_layers : int
        Layers of its text decoder.
    limit : int or None
        Most positions; None: the config names none.
    sha256 : str
        Of its files, or the commit on the hub.
    """

    name: str
    path: str
    tokenizer: PreTrainedTokenizerBase
    n_layers: int
    limit: int | None
    sha256: str


def open_model(name: str) -> ModelSource:
    """Read config and tokenizer.

    Parameters
    ----------
    name : str
        "needle-3m", a folder, or a hub id.

    Raises
    ------
    DataError
        If there is no such model, or it has no tokenizer.
    """
    from transformers import AutoConfig, AutoTokenizer

    path = str(needle_path()) if name == SHIPPED else name
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        msg = f"--model {name}: no model there: {_first_line(error)}"
        raise DataError(msg) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, ImportError, TypeError, AttributeError) as error:
        msg = f"--model {name} has no tokenizer that loads, and text cannot be asked without one: {_first_line(error)}"
        raise DataError(msg) from error
    if not len(tokenizer):
        msg = f"--model {name} has an empty tokenizer, and text cannot be asked without one"
        raise DataError(msg)
    text = config.get_text_config()
    digest = (
        model_sha256(Path(path)) if Path(path).is_dir() else str(getattr(config, "_commit_hash", None) or "unknown")
    )
    return ModelSource(name, path, tokenizer, text.num_hidden_layers, most_positions(text), digest)


def most_positions(config: PretrainedConfig) -> int | None:
    """Positions that a text decoder is made for; None: its config names none.

    Configs with linear RoPE scaling may name the unscaled length (LongChat: 4096, factor 8), those with YaRN put in by
    hand keep the old one (Qwen3: 40960, factor 4 of 32768): the longer of the two counts.
    """
    named: int | None = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind, factor = rope.get("rope_type", rope.get("type")), rope.get("factor")
    if named is None or factor is None or kind not in {"linear", "yarn"}:
        return named
    return max(named, int(factor * (rope.get("original_max_position_embeddings") or named)))


def check_device(device: str) -> None:
    """Try a device.

    Raises
    ------
    ConfigError
        If torch cannot use it.
    """
    import torch

    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        msg = f"--device {device} cannot be used: {_first_line(error)}"
        raise ConfigError(msg) from error


def load_model(source: ModelSource, device: str, dtype: str) -> PreTrainedModel:
    """Load the weights.

    Raises
    ------
    DataError
        If the weights cannot be read, or are not all there: transformers would draw the others at random.
    """
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    if source.name == SHIPPED:
        return load_needle(device, getattr(torch, dtype))[0]
    try:
        with without_progress_bar():
            model, info = AutoModelForCausalLM.from_pretrained(
                source.path, dtype=getattr(torch, dtype), output_loading_info=True
            )
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        msg = f"--model {source.name}: its weights cannot be read: {_first_line(error)}"
        raise DataError(msg) from error
    if missing := sorted(info["missing_keys"]):
        msg = f"--model {source.name}: its files lack {len(missing)} weights of the model, such as {missing[0]}"
        raise DataError(msg)
    return model.to(device).eval()


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
