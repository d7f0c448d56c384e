"""The choice of the instruction set."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest


def run(code: str, override: str | None) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "ICECACHE_SIMD"}
    if override is not None:
        env["ICECACHE_SIMD"] = override
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)


NAME = "from icecache import _core; print(_core.simd())"
USE = "import icecache; icecache.Index(8)"


@pytest.mark.parametrize("override", ["", "scalar"])
def test_the_override_picks_the_set(override: str) -> None:
    best = run(NAME, None).stdout.strip()
    result = run(NAME, override)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == (override or best)


@pytest.mark.parametrize("code", [NAME, USE])
def test_an_unknown_set_is_refused(code: str) -> None:
    result = run(code, "mmx")
    assert result.returncode != 0
    assert "ValueError: ICECACHE_SIMD: expected one that this machine has of scalar, avx2" in result.stderr
    assert result.stderr.rstrip().endswith("got mmx")
