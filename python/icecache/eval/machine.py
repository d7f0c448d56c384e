"""What a result depends on beside its settings: versions, commit, hardware, the model's files."""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from icecache.eval.record import RunPart
from icecache.eval.task import file_sha256

PACKAGES: Final = ("icecache", "torch", "transformers", "triton", "numpy")
WHOLE_BYTES: Final = 1 << 28
"""A model's larger files count by name and size only: hashing 16 GB takes longer than a cell."""


def describe_run(command: Sequence[str], device: str) -> RunPart:
    """Describe this start of the command.

    Parameters
    ----------
    command : sequence of str
        Arguments of the command line.
    device : str
        Where the model runs.
    """
    versions = {"python": platform.python_version(), **{p: v for p in PACKAGES if (v := package_version(p))}}
    hardware: dict[str, str | int] = {
        "device": _device_name(device),
        "processor": processor_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
    }
    now = datetime.datetime.now(datetime.timezone.utc)
    return RunPart(shlex.join(command), now.isoformat(timespec="seconds"), git_commit(), versions, hardware)


def package_version(package: str) -> str | None:
    """Version of an installed package; None: it is not."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _device_name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


def processor_name() -> str:
    """Model name of the processor, as Linux has it, or the machine's kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def git_commit() -> str | None:
    """Commit of the checkout this package runs from, with "+" where files differ; None: no checkout."""
    here = Path(__file__).resolve().parent
    command = ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"]
    try:
        inside = subprocess.run(
            [*command[:3], "ls-files", "--error-unmatch", __file__], capture_output=True, check=False
        )
        if inside.returncode:
            return None
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None


def model_sha256(path: Path) -> str:
    """SHA-256 over a model's files: names, sizes, and the content of those below 256 MiB."""
    digest = hashlib.sha256()
    for file in sorted(p for p in path.iterdir() if p.is_file() and not p.name.startswith(".")):
        size = file.stat().st_size
        content = file_sha256(file) if size <= WHOLE_BYTES else "-"
        digest.update(f"{file.name} {size} {content}\n".encode())
    return digest.hexdigest()


def this_command() -> list[str]:
    """Arguments of this process, the program's name without its folder."""
    return [
        "icecache" if Path(sys.argv[0]).name in {"cli.py", "__main__.py"} else Path(sys.argv[0]).name,
        *sys.argv[1:],
    ]
