"""The README's examples run as they are printed (the model's name aside)."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from icecache.eval.needle import needle_path

README = Path(__file__).parents[3] / "README.md"


def _examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_the_transformers_example_generates(capsys: pytest.CaptureFixture[str]):
    code = next(example for example in _examples() if "IceRuntime" in example)
    assert "meta-llama/Llama-3.1-8B-Instruct" in code
    code = code.replace("meta-llama/Llama-3.1-8B-Instruct", str(needle_path())).replace(
        "max_new_tokens=200", "max_new_tokens=8"
    )
    names = {"long_document": "the grass is green . " * 300, "question": "question : what is the pass key ?"}
    exec(code, names)
    assert names["output"].shape[1] > names["inputs"]["input_ids"].shape[1]
    assert "RuntimeStats" in capsys.readouterr().out


def test_the_index_example_finds_the_vectors_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    code = next(example for example in _examples() if "from icecache import Index" in example)
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    exec(code, names)
    assert names["found"].ids.shape == (5, 10)
    assert len(names["index"]) == 50_000 - 100
