"""Which candidate of each autotuned Triton kernel is used: kept in files of fla's own format.

A choice belongs to a GPU model and to versions of triton and fla, so it lies in a folder named by them. A
folder holds a `{kernel}.json` for each kernel, as fla's loader reads it (FLA_CONFIG_DIR); flame reads them
itself, for Triton kernels that are not fla's too, and so that all ranks have rank 0's.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

CACHE_VARIABLE = "FLAME_KERNEL_CACHE"  # the user's folder for kernels, where it is not the default one
SHIPPED = Path(__file__).parent / "kernel_configs"
_log = logging.getLogger(__name__)

Candidate = dict[str, Any]  # kwargs, num_warps, num_stages, num_ctas, maxnreg, ir_override


@dataclass(frozen=True, slots=True)
class Platform:
    """What compiled kernels and their choices depend on."""

    gpu: str  # as the driver names it
    capability: str  # "9.0"
    torch: str
    triton: str
    fla: str

    @property
    def folder(self) -> Path:
        """Relative: of the choices that are made on such a machine."""
        gpu = re.sub(r"[^0-9A-Za-z]+", "_", self.gpu).strip("_")
        return Path(gpu, f"triton-{self.triton}-fla-{self.fla}")


def kernel_cache() -> Path:
    """The user's folder for kernels."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser()
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "flame" / "kernels"


@dataclass(frozen=True, slots=True)
class Key:
    """One autotuning decision: a kernel and what its choice depends on."""

    module: str  # that defines the kernel
    kernel: str
    values: tuple[Any, ...]  # the arguments that the autotuner keys on, then the tensors' dtypes

    @property
    def digest(self) -> str:
        """As fla names an entry."""
        return hashlib.md5(_canonical(self.values).encode()).hexdigest()

    @property
    def name(self) -> str:
        """Unique among all keys."""
        return f"{self.module}.{self.kernel}/{self.digest}"


def _canonical(values: Any) -> str:
    return json.dumps(values, separators=(",", ":"), sort_keys=True)


@dataclass
class Choices:
    """The choices known to this process."""

    known: dict[str, tuple[Key, Candidate]] = field(default_factory=dict[str, "tuple[Key, Candidate]"])
    save_to: Sequence[Path] = ()  # folders that new choices are written to
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    @staticmethod
    def read(folders: Iterable[Path], save_to: Sequence[Path] = ()) -> Choices:
        """All choices in `folders`; an earlier one goes before a later one."""
        choices = Choices(save_to=save_to)
        for folder in folders:
            for path in sorted(folder.glob("*.json")):
                for key, candidate in _entries(path):
                    choices.known.setdefault(key.name, (key, candidate))
        return choices

    def find(self, key: Key) -> Candidate | None:
        found = self.known.get(key.name)
        return found[1] if found else None

    def add(self, key: Key, candidate: Candidate, triton: str) -> None:
        """Keeps a choice, and writes it down where `save_to` says; a folder that cannot be written is
        passed over."""
        with self._lock:
            self.known[key.name] = (key, candidate)
            for folder in self.save_to:
                try:
                    write_choices(folder, [(key, candidate)], triton)
                except OSError as error:
                    _log.warning("%s: a kernel's choice could not be kept: %s", folder, error)

    def write(self, folder: Path, triton: str) -> None:
        """Writes all of them to `folder`, beside what it holds."""
        write_choices(folder, self.known.values(), triton)


def _entries(path: Path) -> Iterator[tuple[Key, Candidate]]:
    try:
        entries: dict[str, Any] = json.loads(path.read_bytes())["autotune_entries"]
        for entry in entries.values():
            values = _tuples(entry["autotune_key"])
            candidate = cast("Candidate", entry["config"])
            yield Key(str(entry.get("module", "")), path.stem, values), candidate
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _log.warning("%s: not a file of kernel choices, passed over: %s", path, error)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in cast("list[Any]", value)) if isinstance(value, list) else value


def write_choices(folder: Path, found: Iterable[tuple[Key, Candidate]], triton: str) -> None:
    """Adds choices to the files of `folder`. Several processes may do so at once: a file is replaced as a
    whole, under a lock."""
    by_kernel: dict[str, list[tuple[Key, Candidate]]] = {}
    for key, candidate in found:
        by_kernel.setdefault(key.kernel, []).append((key, candidate))
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        for kernel, pairs in by_kernel.items():
            path = folder / f"{kernel}.json"
            merged = (
                {key.name: (key, candidate) for key, candidate in _entries(path)} if path.exists() else {}
            )
            merged.update({key.name: (key, candidate) for key, candidate in pairs})
            replace_file(path, _file(kernel, merged.values(), triton))


def _file(kernel: str, pairs: Iterable[tuple[Key, Candidate]], triton: str) -> bytes:
    entries: dict[str, Any] = {}
    for key, candidate in sorted(pairs, key=lambda pair: pair[0].name):
        # two modules may have a kernel of one name: fla's loader finds the first one's choice by the digest
        digest = key.digest if key.digest not in entries else f"{key.digest}@{key.module}"
        entries[digest] = {"autotune_key": key.values, "module": key.module, "config": candidate}
    body = {"kernel_name": kernel, "triton_version": triton, "autotune_entries": entries}
    return (json.dumps(body, indent=1, sort_keys=True) + "\n").encode()


@contextmanager
def locked(folder: Path) -> Generator[None]:
    """Only one process of this machine at a time."""
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def replace_file(path: Path, content: bytes) -> None:
    """Puts the whole of `content` at `path`, or nothing."""
    partial = path.with_name(f".{path.name}.{os.uname().nodename}.{os.getpid()}.{threading.get_ident()}")
    partial.write_bytes(content)
    partial.replace(path)
