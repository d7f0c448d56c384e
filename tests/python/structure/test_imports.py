"""The folders of the package are the flow of the data; imports point one way along it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3] / "python" / "icecache"
KERNELS = Path(__file__).parents[3] / "kernels"

# What each layer may import, besides itself. A new arrow needs a line in ARCHITECTURE.md.
FLOW = ["index", "pages", "transfer", "select", "attention", "hf", "policies", "runtime"]
BASE = {"errors", "config", "_core"}
ALLOWED = {
    "errors": set(),
    "config": {"errors"},
    "arguments": set(),
    **{layer: BASE | {"stats", *FLOW[:i]} for i, layer in enumerate(FLOW)},
    "stats": {"errors"},
    "bench": BASE | {"kernels", "stats", *FLOW},
    "eval": BASE | {"arguments", "bench", "stats", *FLOW},
    "demo": BASE | {"eval", "bench", "stats", *FLOW},
    "doctor": BASE | {"eval", "index", "kernels", "transfer"},
    "__main__": {"cli"},
    "cli": BASE | {"arguments", "bench", "demo", "doctor", "eval"},
    "__init__": BASE | {"index", "runtime", "stats"},
}
ALLOWED["attention"] = ALLOWED["attention"] | {"kernels"}
ALLOWED["transfer"] = ALLOWED["transfer"] | {"kernels"}


def _imports(path: Path) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found += [f"{module}.{alias.name}" for alias in node.names] if module == "icecache" else [module]
    return found


def _violations(layer: str, modules: list[str]) -> list[str]:
    targets = [m.split(".")[1] for m in modules if m.startswith("icecache.")]
    return [f"{layer} -> {t}" for t in targets if t != layer and t not in ALLOWED[layer]]


def _sources() -> list[Path]:
    return [p for p in ROOT.rglob("*.py") if "kernels" not in p.relative_to(ROOT).parts]


def test_imports_point_one_way_along_the_data_flow():
    broken = {}
    for path in _sources():
        layer = path.relative_to(ROOT).parts[0].removesuffix(".py")
        assert layer in ALLOWED, f"{layer} has no place in the flow; add it to ARCHITECTURE.md and to this table"
        if bad := _violations(layer, _imports(path)):
            broken[str(path.relative_to(ROOT))] = bad
    assert not broken


def test_an_arrow_against_the_flow_would_be_found():
    assert _violations("pages", ["icecache.hf.cache"]) == ["pages -> hf"]


def test_imports_are_absolute():
    assert not [str(p) for p in _sources() if any(m.startswith(".") for m in _imports(p))]


def test_kernels_import_torch_and_triton_only():
    assert not (KERNELS / "__init__.py").exists(), "it would shadow the package `kernels` that transformers uses"
    allowed = {"torch", "triton", "math", "__future__", "icecache.kernels"}
    for path in KERNELS.glob("*.py"):
        roots = {m if m.startswith("icecache.kernels") else m.split(".")[0] for m in _imports(path)}
        assert all(r in allowed or r.startswith("icecache.kernels") for r in roots), (path.name, roots)


def test_no_file_passes_five_hundred_lines():
    repository = ROOT.parents[1]
    suffixes = {".py", ".rs", ".pyi"}
    folders = ["python/icecache", "kernels", "rust", "tests", "benches"]
    files = [
        p for f in folders for p in (repository / f).rglob("*") if p.suffix in suffixes and "target" not in p.parts
    ]
    lengths = {str(p.relative_to(repository)): len(p.read_text(encoding="utf-8").splitlines()) for p in files}
    assert len(lengths) > 20
    assert not {name: n for name, n in lengths.items() if n > 500}


@pytest.mark.parametrize("absent", ["torch", "transformers", "triton", "matplotlib"])
def test_importing_the_package_does_not_import(absent):
    code = f"import icecache, sys; sys.exit({absent!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
