"""What kernels are compiled for, where they are kept, and which of them are wrong there."""

from __future__ import annotations

import os
from collections.abc import Iterable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch
import triton
from packaging.version import Version

from flame.errors import ModelError
from flame.models.kernel_choices import SHIPPED, Platform, kernel_cache

# fla's backward pass with a gate per head (its chunk_bwd_dqkwg) is wrong as these versions compile it for
# Hopper, and fla refuses to run it there
WRONG_ON_HOPPER = (Version("3.4.0"), Version("3.7.1"))  # from, up to but without
GATED = ("gated_deltanet", "comba", "mom")  # where tilelang has one
PER_CHANNEL = ("mamba2",)  # where it has none, and a gate per channel serves


def ask_for_gpu() -> None:
    """Raises ModelError without a GPU."""
    if not torch.cuda.is_available():
        raise ModelError(
            "kernels are made for a GPU and torch sees none here; run this on the machine that trains"
        )


def platform_of(device: torch.device) -> Platform:
    """Raises RuntimeError without a GPU."""
    major, minor = torch.cuda.get_device_capability(device)
    return Platform(
        gpu=torch.cuda.get_device_name(device),
        capability=f"{major}.{minor}",
        torch=torch.__version__,
        triton=triton.__version__,
        fla=version("fla-core"),
    )


def user_folder(platform: Platform) -> Path:
    """The user's own, of all that is kept for this platform."""
    return kernel_cache() / platform.folder


def choice_folders(platform: Platform) -> tuple[Path, Path]:
    """Where choices for this platform may lie: the user's own, and those that come with flame."""
    return user_folder(platform) / "choices", SHIPPED / platform.folder


def compiled_parts(platform: Platform) -> dict[str, Path]:
    """Where compiled kernels lie; what the user has set for Triton and inductor holds."""
    folder = user_folder(platform)
    return {
        part: Path(os.environ.get(variable) or folder / part).expanduser()
        for part, variable in (("triton", "TRITON_CACHE_DIR"), ("inductor", "TORCHINDUCTOR_CACHE_DIR"))
    }


def use_compiled_folders(platform: Platform) -> None:
    """Lets Triton and inductor keep what they compile there, and find what was unpacked."""
    parts = compiled_parts(platform)
    for path in parts.values():
        path.mkdir(parents=True, exist_ok=True)
    os.environ["TRITON_CACHE_DIR"] = str(parts["triton"])
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(parts["inductor"])


def gate_per_head_is_wrong(capability: tuple[int, int], triton_version: str) -> bool:
    """Whether Triton compiles that backward pass wrongly for this GPU."""
    low, high = WRONG_ON_HOPPER
    return capability[0] == 9 and low <= Version(triton_version) < high


def refusal(
    model_type: str, capability: tuple[int, int], triton_version: str, *, tilelang: bool
) -> str | None:
    """Why a model cannot be trained truly on this GPU with these versions; None where it can."""
    if model_type not in GATED or tilelang or not gate_per_head_is_wrong(capability, triton_version):
        return None
    _, high = WRONG_ON_HOPPER
    return (
        f"{model_type} on a Hopper GPU: Triton {triton_version} compiles its backward pass wrongly; install "
        f"tilelang, which fla then uses in its place (pip install tilelang), or Triton {high} or later"
    )


def check_kernels(model_types: Iterable[str], device: torch.device) -> list[str]:
    """What should be said of this GPU's kernels for these models. Raises ModelError where they would be
    wrong."""
    if device.type != "cuda":
        return []
    capability = torch.cuda.get_device_capability(device)
    tilelang = find_spec("tilelang") is not None
    notes: list[str] = []
    for model_type in model_types:
        reason = refusal(model_type, capability, triton.__version__, tilelang=tilelang)
        if reason is not None:
            raise ModelError(reason)
        if tilelang and refusal(model_type, capability, triton.__version__, tilelang=False):
            notes.append(
                f"{model_type}: the backward pass runs on tilelang, not on Triton {triton.__version__}"
            )
        if model_type in PER_CHANNEL and gate_per_head_is_wrong(capability, triton.__version__):
            notes.append(
                f"{model_type}: the scan runs on GLA's kernels, slower: Triton {triton.__version__} compiles "
                f"its own wrongly for this GPU; Triton {WRONG_ON_HOPPER[1]} or later does not"
            )
    return notes
