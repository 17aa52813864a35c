"""The block cache: decoded or fetched pieces of data, made once per node and kept within a bound of bytes.

An entry is one file. It appears whole or not at all, is made by one process while the others that want it
wait, and may be removed at any time: whoever reads it holds it open.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

from flame.errors import DataError

DEFAULT_BYTES = 64 * 2**30
SUFFIX, PART, LOCK = ".block", ".part", ".lock"


class Vocabulary(NamedTuple):
    """What a recipe's tokenizer makes of token ids."""

    size: int  # the largest id + 1
    eos: int
    bos: int | None  # where it is put before each document


@dataclass(frozen=True, slots=True)
class Access:
    """How a source's files may be read. Picklable: each node finds its own default directory."""

    cache_directory: str | None = None  # None: a directory of the user's
    cache_bytes: int = DEFAULT_BYTES  # that the cache may hold on one node
    skip_corrupt: bool = False  # an undecodable frame or row group becomes a skipped record
    vocabulary: Vocabulary | None = None  # for files of token ids; None where no tokenizer is known

    @property
    def cache(self) -> BlockCache:
        return BlockCache(cache_directory(self.cache_directory), self.cache_bytes)


LOCAL = Access()  # what a recipe has where it says nothing


def cache_directory(chosen: str | None) -> Path:
    """The directory of the cache: the chosen one, else `flame/blocks` in the user's cache directory."""
    if chosen is not None:
        return Path(chosen).expanduser()
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "flame" / "blocks"


@dataclass(slots=True)
class Use:
    """What this process had of a cache directory."""

    sizes: dict[str, int] = field(default_factory=dict[str, int])  # of entries, in bytes
    again: int = 0  # bytes of entries made again, because they had been removed
    warned: bool = False


_uses: dict[Path, Use] = {}


@dataclass(frozen=True, slots=True)
class BlockCache:
    """A directory of entries, shared by all processes of a node."""

    directory: Path
    most_bytes: int

    def open(self, key: str, make: Callable[[BinaryIO], None]) -> int:
        """A descriptor of the entry `key`, which `make` writes where it is not there. The caller closes it.

        `make` is called by one process at a time; what it raises leaves no entry. Raises DataError where
        the directory cannot be written.
        """
        path = self.directory / self._name(key)
        use = _uses.setdefault(self.directory, Use())
        try:
            opened = self._open_or_make(path, make, use)
        except OSError as error:
            raise DataError(
                f"block cache {self.directory}: cannot be used: {error}; make room or set "
                "data.cache_directory to a directory that can be written"
            ) from None
        use.sizes[path.name] = os.fstat(opened).st_size
        return opened

    def _open_or_make(self, path: Path, make: Callable[[BinaryIO], None], use: Use) -> int:
        found = _open(path)
        if found is not None:
            return found
        self.directory.mkdir(parents=True, exist_ok=True)
        with _locked(path.with_suffix(LOCK)):
            found = _open(path)  # another process may have made it meanwhile
            if found is not None:
                return found
            made = self._make(path, make)
        if path.name in use.sizes:
            self._made_again(use, os.fstat(made).st_size)
        return made

    def _made_again(self, use: Use, size: int) -> None:
        """Say so when as much as the whole cache holds had to be made again."""
        use.again += size
        if use.again < self.most_bytes or use.warned:
            return
        use.warned = True
        warnings.warn(
            f"block cache {self.directory}: data.cache_bytes = {self.most_bytes} is too small: what was "
            f"decoded or fetched is removed before it is needed again; this process alone has used "
            f"{sum(list(use.sizes.values()))} bytes of it so far: set data.cache_bytes to at least that",
            RuntimeWarning,
            stacklevel=2,
        )

    def _name(self, key: str) -> str:
        """A file name that a person recognises, and that is the key's alone."""
        shown = re.sub(r"[^A-Za-z0-9._-]+", "_", key.rpartition("/")[2])[:40]
        return f"{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}-{shown}{SUFFIX}"

    def _make(self, path: Path, make: Callable[[BinaryIO], None]) -> int:
        part = path.with_suffix(PART)  # one maker at a time: a killed one's leftovers are written over
        try:
            with part.open("wb") as file:
                make(file)
            made = os.open(part, os.O_RDONLY)
            part.rename(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        self._remove_oldest(path)
        return made

    def _remove_oldest(self, kept: Path) -> None:
        """Remove entries, least recently used first, until the cache is within its bound."""
        with _locked(self.directory / f"all{LOCK}"):
            entries: list[tuple[float, int, Path]] = []
            for path in self.directory.glob(f"*{SUFFIX}"):
                try:
                    status = path.stat()
                except FileNotFoundError:
                    continue
                entries.append((status.st_mtime_ns, status.st_size, path))
            held = sum(size for _, size, _ in entries)
            for _, size, path in sorted(entries):
                if held <= self.most_bytes:
                    break
                if path != kept:
                    path.unlink(missing_ok=True)
                    held -= size


def _open(path: Path) -> int | None:
    """An entry opened and marked as used now; None where it is not there."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    with suppress(PermissionError):  # another user's: it keeps its age
        os.utime(descriptor)
    return descriptor


@contextmanager
def _locked(path: Path) -> Generator[None, None, None]:
    """Hold a lock file; the system frees it when its holder dies.

    The file is removed by its last holder. One who locked a removed file has locked nothing, and tries again.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if not _is_still(path, descriptor):
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
            return
        finally:
            os.close(descriptor)


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return path.stat().st_ino == os.fstat(descriptor).st_ino
    except FileNotFoundError:
        return False
