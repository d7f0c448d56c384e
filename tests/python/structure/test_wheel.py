"""The wheel holds what the checkout holds: a build of it is unpacked and compared."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """Build a wheel with the compiled objects that are there already."""
    out = tmp_path_factory.mktemp("wheel")
    command = [str(Path(sys.executable).parent / "maturin"), "build", "--release", "-q", "--out", str(out)]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("*.whl")
    assert "cp310-abi3" in built.name
    return zipfile.ZipFile(built)


def test_the_kernels_are_shipped_unchanged(wheel):
    sources = list((REPOSITORY / "kernels").glob("*.py"))
    assert sources
    for path in sources:
        assert wheel.read(f"icecache/kernels/{path.name}") == path.read_bytes()
    assert "icecache/kernels/__init__.py" not in wheel.namelist()


def test_the_model_is_shipped_unchanged(wheel):
    model = REPOSITORY / "python" / "icecache" / "models" / "needle-3m"
    files = [p for p in model.rglob("*") if p.is_file()]
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= {p.name for p in files}
    for path in files:
        assert wheel.read(f"icecache/models/needle-3m/{path.relative_to(model)}") == path.read_bytes()


def test_every_module_the_types_and_the_licences_are_shipped(wheel):
    names = set(wheel.namelist())
    package = REPOSITORY / "python" / "icecache"
    for path in package.rglob("*.py"):
        if "kernels" not in path.parts:
            assert f"icecache/{path.relative_to(package)}" in names
    assert {"icecache/py.typed", "icecache/_core.pyi"} <= names
    assert any(name.startswith("icecache/_core.") and name.endswith((".so", ".pyd")) for name in names)
    assert any(name.endswith("licenses/LICENSE-MIT") for name in names)
    assert not [n for n in names if n.startswith(("kernels/", "tests/", "rust/"))]
