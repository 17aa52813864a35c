"""The machine without its GPUs: Python, packages, compiler, limits, shared memory, cores and clock."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement

from flame.doctor.finding import Finding, fail, ok, warn

OPEN_FILES = 4096  # shards, checkpoints' files and sockets of a large run
SHARED_MEMORY = 2**30  # NCCL's between ranks of one machine; Docker gives 64 MiB unless asked
CORES_PER_GPU = 4  # the rank, its loader's thread and the tokenizer's
PYTHONS = ((3, 11), (3, 14))  # from, up to but without


def python() -> Finding:
    found = f"{sys.version_info.major}.{sys.version_info.minor}.{sys.version_info.micro}, {sys.executable}"
    low, high = PYTHONS
    if sys.version_info[:2] < low:
        return fail("python", found, f"flame needs Python {low[0]}.{low[1]} or later")
    if sys.version_info[:2] >= high:
        return warn(
            "python", found, f"not tried yet; Python {low[0]}.{low[1]} to {high[0]}.{high[1] - 1} are"
        )
    return ok("python", found)


def packages() -> Iterator[Finding]:
    """Whether flame's requirements are met, and those of other packages on torch."""
    try:
        needed = [Requirement(text) for text in metadata.requires("flame") or ()]
    except metadata.PackageNotFoundError:
        yield warn("packages", "flame is not installed as a package", "pip install -e . in flame's checkout")
        needed = []
    wrong = [text for need in needed if (text := unmet(need)) is not None]
    if wrong:
        names = " ".join(f'"{need}"' for need in needed if unmet(need) is not None)
        yield fail("packages", "; ".join(wrong), f"pip install {names}")
    elif needed:
        yield ok("packages", f"{len(needed)} requirements met")
    yield from fla_packages()
    for name, need in wanting_other_torch():
        yield warn(
            "packages",
            f"{name} needs {need}, found {version('torch')}",
            f"pip install {name} of the same release as torch, or remove it: it may break on import",
        )


def unmet(need: Requirement) -> str | None:
    """What is wrong with an installed package; None where nothing is, or where the requirement is an extra's
    or another platform's."""
    if need.marker is not None and not need.marker.evaluate({"extra": ""}):
        return None
    found = version(need.name)
    if found is None:
        return f"{need.name} is missing"
    good = need.specifier.contains(found, prereleases=True)
    return None if good else f"{need.name} is {found}, needed is {need.specifier}"


def fla_packages() -> Iterator[Finding]:
    """fla comes as two packages that must be of one release."""
    core, whole = version("fla-core"), version("flash-linear-attention")
    if core != whole:
        yield fail(
            "packages",
            f"fla-core {core} beside flash-linear-attention {whole}",
            f"pip install fla-core=={whole}",
        )


def wanting_other_torch() -> Iterator[tuple[str, Requirement]]:
    """Installed packages that need another torch than there is."""
    for found in metadata.distributions():
        for text in found.requires or ():
            if text.startswith("torch") and (need := Requirement(text)).name == "torch" and unmet(need):
                yield found.name, need


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def compiler(on_gpu: bool) -> Finding:
    """Triton compiles its launchers with a C compiler and Python's headers."""
    names = (os.environ.get("CC"), "gcc", "clang", "cc")
    found = next((path for name in names if name and (path := shutil.which(name))), None)
    headers = Path(sysconfig.get_paths()["include"]) / "Python.h"
    judge = fail if on_gpu else warn
    if found is None:
        return judge("compiler", "no C compiler", "Triton needs one: apt-get install gcc, or set CC")
    if not headers.is_file():
        fix = (
            f"Triton needs them: apt-get install python{sys.version_info.major}.{sys.version_info.minor}-dev"
        )
        return judge("compiler", f"{found}, but no {headers}", fix)
    return ok("compiler", f"{found}, with Python's headers")


def open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"{soft:,} open files" if soft != resource.RLIM_INFINITY else "any number of open files"
    if soft == resource.RLIM_INFINITY or soft >= OPEN_FILES:
        return ok("file limit", found)
    allowed = "unlimited" if hard == resource.RLIM_INFINITY else f"{hard:,}"
    return warn("file limit", found, f"ulimit -n 65536 before flame (the hard limit is {allowed})")


def shared_memory(gpus: int, path: Path = Path("/dev/shm")) -> Finding:
    fix = "in Docker: --ipc=host or --shm-size=16g; in Kubernetes: an emptyDir of medium Memory at /dev/shm"
    if not path.is_dir() or not os.access(path, os.W_OK):
        return (fail if gpus > 1 else warn)("shared memory", f"{path} cannot be written", fix)
    size = shutil.disk_usage(path)
    found = f"{path}: {size.free / 2**30:.1f} GiB free of {size.total / 2**30:.1f}"
    if size.free < SHARED_MEMORY:
        return (fail if gpus > 1 else warn)("shared memory", found, fix)
    return ok("shared memory", found)


def cores(gpus: int) -> Finding:
    count = len(os.sched_getaffinity(0))
    found = f"{count} for {gpus} GPUs" if gpus else f"{count}"
    if count < CORES_PER_GPU * gpus:
        return warn(
            "cores",
            found,
            f"give {CORES_PER_GPU * gpus} or more (Slurm: --cpus-per-task); flame data bench RECIPE tells "
            "whether text is tokenized fast enough",
        )
    return ok("cores", found)


def clock(written: Iterable[Path]) -> Finding:
    """Whether the clock is behind files that were `written` before now, and whether something sets it."""
    now = time.time()
    latest = max((path.stat().st_mtime for path in written if path.exists()), default=now)
    shown = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now))
    if latest > now + 60:
        behind = f"{shown}, {latest - now:.0f} s behind flame's own files"
        return fail("clock", behind, "set it: chronyd, or timedatectl set-ntp true")
    try:
        told = subprocess.run(
            ["timedatectl", "show", "-p", "NTPSynchronized", "--value"],
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        ).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        told = ""
    if told == "no":
        return warn(
            "clock", f"{shown}, not synchronised", "timedatectl set-ntp true: logs of nodes are compared"
        )
    return ok("clock", shown + (", synchronised" if told == "yes" else ""))
