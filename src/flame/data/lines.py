"""Formats of text: JSON lines, and plain text files."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import numpy as np
import orjson

from flame.data.blocks import even_ranges
from flame.data.formats import OPEN_FILES, Bad, decode_utf8, file_size
from flame.errors import DataError

COUNTED_BYTES = 2**30  # lines are numbered in files up to this size; beyond, a place is a byte offset
CHUNK = 2**20  # bytes read at once where lines are counted


class Handles:
    """Open files, the least lately used closed first."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths = paths
        self._open: OrderedDict[int, int] = OrderedDict()

    def read(self, file: int, start: int, length: int) -> bytes:
        """`length` bytes from `start`, fewer only at the file's end."""
        try:
            descriptor = self._descriptor(file)
            content = os.pread(descriptor, length, start)
            while len(content) < length and (
                more := os.pread(descriptor, length - len(content), start + len(content))
            ):
                content += more
        except OSError as error:
            raise DataError(f"{self._paths[file]}: cannot be read: {error}") from None
        return content

    def read_exactly(self, file: int, start: int, length: int) -> bytes:
        content = self.read(file, start, length)
        if len(content) < length:
            raise DataError(
                f"{self._paths[file]}: ends at byte {start + len(content)}, but was at least "
                f"{start + length} bytes long when the run began; put the file back as it was"
            )
        return content

    def _descriptor(self, file: int) -> int:
        descriptor = self._open.pop(file, None)
        if descriptor is None:
            if len(self._open) >= OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            descriptor = os.open(self._paths[file], os.O_RDONLY)
        self._open[file] = descriptor
        return descriptor

    def __del__(self) -> None:
        for descriptor in self._open.values():
            os.close(descriptor)


class JsonLines:
    """One JSON object a line; a range is in bytes, and a line belongs to where it begins."""

    def __init__(self, paths: list[Path], field: str) -> None:
        self._paths, self._field = paths, field
        self._handles = Handles(paths)
        self._newlines: dict[int, list[int]] = {}  # newlines before each CHUNK of a file

    @staticmethod
    def fields(path: Path) -> list[str] | None:
        """The fields of the first 100 objects, looked for in the first 1,000 lines."""
        objects: list[dict[str, Any]] = []
        try:
            with path.open("rb") as lines:
                for _, line in zip(range(1000), lines, strict=False):
                    record = _json(line)
                    if isinstance(record, dict):
                        objects.append(cast("dict[str, Any]", record))
                    if len(objects) == 100:
                        break
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error}") from None
        if not objects:
            raise DataError(f"{path}: none of its first 1,000 lines is a JSON object; expected one a line")
        return list(dict.fromkeys(name for record in objects for name in record))

    def decoded_bytes(self, file: int) -> int:
        return file_size(self._paths[file])

    def documents(self, file: int) -> tuple[np.ndarray, np.ndarray]:
        content = self._handles.read_exactly(file, 0, file_size(self._paths[file]))
        data = np.frombuffer(content, dtype=np.uint8)
        stops = np.flatnonzero(data == ord("\n")).astype(np.int64) + 1
        if len(data) and (not len(stops) or stops[-1] != len(data)):
            stops = np.append(stops, len(data))
        starts = np.concatenate([np.zeros(1, dtype=np.int64), stops[:-1]])[: len(stops)]
        if len(stops):
            printed = np.maximum.reduceat(data, starts) > ord(" ")
            for i in np.flatnonzero(~printed):  # few: lines of blanks and control characters
                printed[i] = bool(content[starts[i] : stops[i]].strip())
            starts, stops = starts[printed], stops[printed]
        return starts, stops

    def ranges(self, file: int, block_bytes: int) -> tuple[np.ndarray, np.ndarray]:
        size = file_size(self._paths[file])
        return even_ranges(0, size, max(1, -(-size // block_bytes)))

    def read(self, file: int, start: int, stop: int) -> list[tuple[int, bytes | None]]:
        first = max(0, start - 1)  # a line begins at `start` only where a newline comes before
        content = self._handles.read_exactly(file, first, stop - first)
        if start:
            newline = content.find(b"\n")
            if newline < 0:
                return []
            content, start = content[newline + 1 :], first + newline + 1
            if not content:
                return []
        size = CHUNK // 16
        while not content.endswith(b"\n"):  # the last line goes on behind the range
            more = self._handles.read(file, start + len(content), size)
            end = more.find(b"\n")
            content += more[: end + 1] if end >= 0 else more
            if len(more) < size:
                break
            size *= 2
        found: list[tuple[int, bytes | None]] = []
        for line in _lines(content):
            if line.strip():
                found.append((start, line))
            start += len(line)
        return found

    def decode(self, content: bytes | None) -> str | Bad:
        record = _json(content or b"")
        if not isinstance(record, dict):
            return record if isinstance(record, Bad) else Bad("not a JSON object")
        fields = cast("dict[str, Any]", record)
        if self._field not in fields:
            return Bad(f'no field "{self._field}"')
        text: Any = fields[self._field]
        if not isinstance(text, str):
            return Bad(f'field "{self._field}" is {"null" if text is None else "no string"}')
        return text or Bad("empty text")

    def place(self, file: int, position: int) -> str:
        if position > COUNTED_BYTES:
            return f"byte {position}"
        counts = self._newlines.setdefault(file, [0])
        while len(counts) <= position // CHUNK:
            chunk = self._handles.read(file, (len(counts) - 1) * CHUNK, CHUNK)
            counts.append(counts[-1] + chunk.count(b"\n"))
        whole = position // CHUNK
        rest = self._handles.read(file, whole * CHUNK, position - whole * CHUNK)
        line = counts[whole] + rest.count(b"\n") + 1
        return f"line {line}"


def _lines(content: bytes) -> Iterator[bytes]:
    """`bytes.splitlines` would also end a line at a carriage return."""
    *whole, last = content.split(b"\n")
    for line in whole:
        yield line + b"\n"
    if last:
        yield last


def _json(line: bytes) -> Any:
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError as error:
        bad = decode_utf8(line)
        return bad if isinstance(bad, Bad) else Bad(f"not valid JSON: {error.msg}")


class PlainText:
    """A document a file; its position is 0."""

    def __init__(self, paths: list[Path], field: str) -> None:
        self._paths = paths
        self._handles = Handles(paths)

    @staticmethod
    def fields(path: Path) -> list[str] | None:
        return None

    def decoded_bytes(self, file: int) -> int:
        return 0  # a file is a document and a block, however large the source

    def documents(self, file: int) -> tuple[np.ndarray, np.ndarray]:
        return even_ranges(0, file_size(self._paths[file]), 1)

    def ranges(self, file: int, block_bytes: int) -> tuple[np.ndarray, np.ndarray]:
        return self.documents(file)

    def read(self, file: int, start: int, stop: int) -> list[tuple[int, bytes | None]]:
        return [(start, self._handles.read_exactly(file, start, stop - start))]

    def decode(self, content: bytes | None) -> str | Bad:
        return decode_utf8(content)

    def place(self, file: int, position: int) -> str:
        return "the whole file"
