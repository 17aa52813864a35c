"""The bytes of files as they are stored, before any decoding."""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from flame.errors import DataError

HASHED = 64 * 2**10  # bytes at a file's head and tail
URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")


def is_url(path: Path | str) -> bool:
    """Whether this names a remote file."""
    return isinstance(path, str) and URL.match(path) is not None


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file of a source. `name` is relative to the globs' fixed prefix: a moved folder is the same data."""

    name: str
    path: Path | str  # a URL is a string
    size: int  # in bytes, as stored
    hash: str  # of its first and last 64 KiB

    @property
    def key(self) -> str:
        """What the block cache calls this content."""
        return f"{self.hash}/{self.size}/{self.name}"


class RawFile(Protocol):
    """A file that can be read anywhere."""

    @property
    def size(self) -> int: ...

    def read(self, start: int, length: int) -> bytes:
        """`length` bytes from `start`, fewer only at the file's end. Raises DataError."""
        ...

    def expect(self, start: int, length: int) -> None:
        """This will be read soon."""
        ...

    def close(self) -> None: ...


class LocalFile:
    """A file of this machine, or the open descriptor of one."""

    def __init__(self, path: Path, descriptor: int | None = None) -> None:
        self._path = path
        try:
            self._descriptor = os.open(path, os.O_RDONLY) if descriptor is None else descriptor
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error}") from None

    @property
    def size(self) -> int:
        return os.fstat(self._descriptor).st_size

    def read(self, start: int, length: int) -> bytes:
        try:
            content = os.pread(self._descriptor, length, start)
            while len(content) < length and (
                more := os.pread(self._descriptor, length - len(content), start + len(content))
            ):
                content += more
        except OSError as error:
            raise DataError(f"{self._path}: cannot be read: {error}") from None
        return content

    def expect(self, start: int, length: int) -> None:
        pass  # the system reads ahead

    def close(self) -> None:
        os.close(self._descriptor)


def read_exactly(path: Path | str, file: RawFile, start: int, length: int) -> bytes:
    """`length` bytes from `start`. Raises DataError where the file ends before."""
    content = file.read(start, length)
    if len(content) < length:
        raise shrunk(path, start + len(content), start + length)
    return content


def shrunk(path: Path | str, found: int, expected: int, unit: str = "bytes") -> DataError:
    """The error of a file that lost its end while it was in use."""
    return DataError(
        f"{path}: ends after {found} {unit}, but had at least {expected} when the run began; "
        "put the file back as it was"
    )


def ends_hash(file: RawFile, size: int) -> str:
    """A hash of the first and last 64 KiB of a file."""
    digest = hashlib.blake2b(file.read(0, min(size, HASHED)), digest_size=16)
    digest.update(file.read(max(0, size - HASHED), min(size, HASHED)))
    return digest.hexdigest()
