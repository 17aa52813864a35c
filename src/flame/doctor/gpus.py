"""GPUs: torch and the driver, kernels known to be wrong, and the health that nvidia-smi tells."""

from __future__ import annotations

import csv
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec

import torch

from flame.doctor.finding import Finding, fail, ok, warn
from flame.models.kernel_platform import (
    GATED,
    PER_CHANNEL,
    WRONG_ON_HOPPER,
    gate_per_head_is_wrong,
    refusal,
)

HOT_CELSIUS = 85
HELD_MIB = 2048  # by others, before a run begins
FIELDS = (
    "index",
    "name",
    "driver_version",
    "temperature.gpu",
    "memory.used",
    "memory.total",
    "ecc.errors.uncorrected.volatile.total",
    "clocks_throttle_reasons.hw_slowdown",
)


@dataclass(frozen=True, slots=True)
class Seen:
    """What the driver says of the machine, as far as torch is not asked."""

    gpus: int  # that torch can use
    cuda: str | None  # that torch was built for
    driver_cuda: str | None  # the newest that the driver runs
    listed: int  # GPUs that nvidia-smi lists


def look() -> Seen:
    """Asks torch and nvidia-smi."""
    available = torch.cuda.is_available()
    return Seen(
        torch.cuda.device_count() if available else 0,
        torch.version.cuda,
        driver_cuda(),
        len(gpu_rows() or ()),
    )


def driver_cuda() -> str | None:
    """`13.0`: what the installed driver runs; None without one."""
    try:
        number = int(torch._C._cuda_getDriverVersion())  # pyright: ignore[reportAttributeAccessIssue, reportPrivateUsage]
    except (AttributeError, RuntimeError):
        return None
    return f"{number // 1000}.{number % 1000 // 10}" if number else None


def torch_and_driver(seen: Seen) -> Finding:
    """Whether torch and the driver agree."""
    found = f"torch {torch.__version__}"
    if seen.gpus:
        return ok(
            "torch", f"{found}, CUDA {seen.cuda} on a driver for {seen.driver_cuda}, {seen.gpus} GPU(s)"
        )
    if not seen.listed:
        return ok("torch", f"{found}, no GPU here: training is on the CPU")
    if seen.cuda is None:
        found += f" is a build for the CPU, but there are {seen.listed} GPU(s)"
        return fail("torch", found, "pip install torch of a CUDA build: pytorch.org/get-started")
    fix = "update the NVIDIA driver, or install a torch for an older CUDA; in a container: --gpus all"
    return fail(
        "torch", f"{found} for CUDA {seen.cuda}, driver for {seen.driver_cuda}: no GPU can be used", fix
    )


def kernels(
    capability: tuple[int, int], triton_version: str, *, tilelang: bool, model_types: Iterable[str] | None
) -> Finding:
    """fla and Triton on this kind of GPU. `model_types`: of the recipe; None: no recipe is known."""
    found = f"Triton {triton_version}, fla {version('fla-core')}, GPU {capability[0]}.{capability[1]}"
    if not gate_per_head_is_wrong(capability, triton_version):
        return ok("kernels", found)
    fix = f'pip install tilelang, which fla then uses in its place, or "triton>={WRONG_ON_HOPPER[1]}"'
    if model_types is None:
        if tilelang:
            return ok("kernels", f"{found}, and tilelang where this Triton is wrong on Hopper")
        return warn("kernels", f"{found}: this Triton compiles {', '.join(GATED)} wrongly on Hopper", fix)
    reasons = [refusal(name, capability, triton_version, tilelang=tilelang) for name in model_types]
    wrong = [reason for reason in reasons if reason is not None]
    if wrong:
        return fail("kernels", "; ".join(wrong), fix)
    if set(model_types) & set(PER_CHANNEL):
        return warn("kernels", f"{found}: mamba2's scan runs on slower kernels", fix.partition(", or ")[2])
    return ok("kernels", found)


def kernels_here(model_types: Iterable[str] | None) -> Finding:
    """`kernels` of the first GPU, or without one of nothing."""
    if not torch.cuda.is_available():
        return ok("kernels", f"fla {version('fla-core')}, plain PyTorch in its kernels' place on a CPU")
    capability = torch.cuda.get_device_capability(0)
    tilelang = find_spec("tilelang") is not None
    return kernels(capability, version("triton"), tilelang=tilelang, model_types=model_types)


def gpu_rows() -> list[dict[str, str]] | None:
    """What nvidia-smi says of each GPU; None without it."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    query = [command, f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode != 0:
        return None
    rows = csv.reader(done.stdout.splitlines(), skipinitialspace=True)
    return [dict(zip(FIELDS, row, strict=True)) for row in rows if len(row) == len(FIELDS)]


def health() -> Iterator[Finding]:
    """A line for each GPU."""
    if shutil.which("nvidia-smi") is None:
        return
    rows = gpu_rows()
    if not rows:
        yield fail("GPUs", "nvidia-smi lists none, or does not answer", "look at dmesg; reboot the machine")
    for row in rows or ():
        yield gpu_health(row)


def gpu_health(row: dict[str, str]) -> Finding:
    """Whether one GPU is well, from its row of nvidia-smi."""
    name = f"GPU {row['index']}"
    used, total = number(row["memory.used"]), number(row["memory.total"])
    heat = number(row["temperature.gpu"])
    memory = f"{used or 0:,.0f} of {total or 0:,.0f} MiB used"
    found = f"{row['name']}, driver {row['driver_version']}, {row['temperature.gpu']} C, {memory}"
    if number(row["ecc.errors.uncorrected.volatile.total"]):
        errors = row["ecc.errors.uncorrected.volatile.total"]
        fix = "have the GPU reset (nvidia-smi -r) or take it out"
        return fail(name, f"{found}, {errors} uncorrected memory errors", fix)
    if used is not None and used > HELD_MIB:
        return warn(name, found, "another process holds its memory: nvidia-smi names it")
    if row["clocks_throttle_reasons.hw_slowdown"] == "Active":
        fix = "check power and cooling: nvidia-smi -q -d PERFORMANCE"
        return warn(name, f"{found}, slowed down by its hardware", fix)
    if heat is not None and heat >= HOT_CELSIUS:
        return warn(name, found, "check its cooling: it will slow down")
    return ok(name, found)


def number(text: str) -> float | None:
    """nvidia-smi's number; None where it says `[N/A]`."""
    try:
        return float(text)
    except ValueError:
        return None
