"""What a run was made with: versions, hardware, and the state of flame's own code."""

from __future__ import annotations

import os
import platform
import socket
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import flame

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "fla-core",
    "flash-linear-attention",
    "torchtitan",
    "tokenizers",
)


def device_name(device: torch.device) -> str:
    """`NVIDIA H100 80GB HBM3`, or the processor's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor_name()


def processor_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def environment(device: torch.device) -> dict[str, Any]:
    """The environment as a run directory keeps it."""
    return {
        "flame": flame.__version__,
        "git": git_state(Path(__file__).parent),
        "python": platform.python_version(),
        "packages": {name: found for name in PACKAGES if (found := _version(name))},
        "cuda": torch.version.cuda,
        "device": device_name(device),
        "devices": torch.cuda.device_count() if device.type == "cuda" else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "host": socket.gethostname(),
        "system": platform.platform(),
    }


def git_state(folder: Path) -> dict[str, str] | None:
    """Commit and uncommitted changes of the checkout that `folder` lies in; None outside of one."""
    commit = _git(folder, "rev-parse", "HEAD")
    return {"commit": commit, "diff": _git(folder, "diff", "HEAD") or ""} if commit else None


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
