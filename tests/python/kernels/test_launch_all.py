"""The program for memory checkers reaches every kernel; on a GPU it is run as it is."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from launch_all import CASES, counted_launches, launches


def test_the_program_for_memory_checkers_launches_every_kernel():
    with counted_launches() as counts:
        for _ in launches(CASES[:1]):
            pass
    assert len(counts) >= 15
    assert all(counts.values()), counts


@pytest.mark.gpu
def test_it_ends_well_on_a_device():
    path = Path(__file__).with_name("launch_all.py")
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run([sys.executable, path], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
