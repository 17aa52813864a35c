"""Formats of text: JSON lines, and plain text files."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import orjson

from flame.data.cache import LOCAL, Access
from flame.data.files import Files, View, as_files, head_lines
from flame.data.formats import Bad, Record, decode_utf8
from flame.data.raw import SourceFile
from flame.errors import DataError

COUNTED_BYTES = 2**30  # lines are numbered in files up to this size; beyond, a place is a byte offset
NEWLINE = ord("\n")
CHUNK = 2**20  # bytes read at once where lines are counted


class Text:
    """What the text formats share: where the records are is theirs to say."""

    def __init__(self, paths: Sequence[Path | str | SourceFile], field: str, access: Access = LOCAL) -> None:
        self._field = field
        self._files = Files(as_files(paths), access)

    def decoded_bytes(self, file: int) -> int:
        return self._files[file].estimate()

    def expect(self, file: int, start: int, stop: int) -> None:
        self._files[file].expect(start, stop)


class JsonLines(Text):
    """One JSON object a line; a range is in bytes, and a line belongs to where it begins."""

    def __init__(self, paths: Sequence[Path | str | SourceFile], field: str, access: Access = LOCAL) -> None:
        super().__init__(paths, field, access)
        self._newlines: dict[int, list[int]] = {}  # newlines before each CHUNK of a file

    @staticmethod
    def fields(path: Path | str | SourceFile, access: Access = LOCAL) -> list[str] | None:
        """The fields of the first 100 objects, looked for in the first 1,000 lines."""
        objects: list[dict[str, Any]] = []
        for line in islice(head_lines(path, access), 1000):
            record = parse_json(line)
            if isinstance(record, dict):
                objects.append(cast("dict[str, Any]", record))
            if len(objects) == 100:
                break
        path = path.path if isinstance(path, SourceFile) else path
        if not objects:
            raise DataError(f"{path}: none of its first 1,000 lines is a JSON object; expected one a line")
        return list(dict.fromkeys(name for record in objects for name in record))

    def documents(self, file: int) -> tuple[np.ndarray, np.ndarray]:
        size = self._files[file].size()
        content = self._files.read_exactly(file, 0, size)
        data = np.frombuffer(content, dtype=np.uint8)
        stops = np.flatnonzero(data == NEWLINE).astype(np.int64) + 1
        if len(data) and (not len(stops) or stops[-1] != len(data)):
            stops = np.append(stops, len(data))
        starts = np.concatenate([np.zeros(1, dtype=np.int64), stops[:-1]])[: len(stops)]
        if len(stops):
            printed = np.maximum.reduceat(data, starts) > ord(" ")
            for i in np.flatnonzero(~printed):  # few: lines of blanks and control characters
                printed[i] = bool(content[starts[i] : stops[i]].strip())
            starts, stops = starts[printed], stops[printed]
        lost = np.array([at for at, _ in self._files[file].corrupt(0, size)], dtype=np.int64)
        if len(lost):
            stops = stops - np.isin(stops - 1, lost)  # what is lost belongs to no line
            order = np.argsort(np.concatenate([starts, lost]), kind="stable")
            starts = np.concatenate([starts, lost])[order]
            stops = np.concatenate([stops, lost + 1])[order]
        return starts, stops

    def ranges(self, file: int, block_bytes: int) -> tuple[np.ndarray, np.ndarray]:
        return self._files[file].cut(block_bytes)

    def read(self, file: int, start: int, stop: int) -> list[Record]:
        view = self._files[file]
        start, stop = view.place(start, stop)
        if start == stop:
            return []
        lines, lost = self._lines(file, view, start, stop), view.corrupt(start, stop)
        if not lost:
            return lines
        return sorted([*lines, *((at, Bad(reason)) for at, reason in lost)], key=lambda record: record[0])

    def _lines(self, file: int, view: View, start: int, stop: int) -> list[Record]:
        """The lines that begin in a range, blank ones left out."""
        first = max(0, start - 1)  # a line begins at `start` only where a newline comes before
        content = view.read(first, stop - first)
        if len(content) < stop - first:
            raise self._files.shrunk(file, first + len(content), stop)
        if start and content[0] == NEWLINE and content.find(b"\n", 1) == len(content) - 1:
            line = content[1:]  # one whole line: nearly always where a block is a document
            return [] if line.isspace() else [(start, line)]
        if start:
            newline = content.find(b"\n")
            if newline < 0:
                return []
            content, start = content[newline + 1 :], first + newline + 1
            if not content:
                return []
        size = CHUNK // 16
        while not content.endswith(b"\n"):  # the last line goes on behind the range
            more = view.read(start + len(content), size)
            end = more.find(b"\n")
            content += more[: end + 1] if end >= 0 else more
            if len(more) < size:
                break
            size *= 2
        *whole, last = content.split(b"\n")  # bytes.splitlines would also end a line at a carriage return
        found: list[Record] = []
        for line in whole:
            if line and not line.isspace():
                found.append((start, line + b"\n"))
            start += len(line) + 1
        if last and not last.isspace():
            found.append((start, last))
        return found

    def decode(self, content: bytes | None) -> str | Bad:
        record = parse_json(content or b"")
        if not isinstance(record, dict):
            return record if isinstance(record, Bad) else Bad("not a JSON object")
        fields: dict[str, Any] = record
        text: Any = fields.get(self._field)
        if isinstance(text, str):
            return text or Bad("empty text")
        if self._field not in fields:
            return Bad(f'no field "{self._field}"')
        return Bad(f'field "{self._field}" is {"null" if text is None else "no string"}')

    def place(self, file: int, position: int) -> str:
        if position > COUNTED_BYTES:
            return f"byte {position}"
        counts = self._newlines.setdefault(file, [0])
        while len(counts) <= position // CHUNK:
            chunk = self._files[file].read((len(counts) - 1) * CHUNK, CHUNK)
            counts.append(counts[-1] + chunk.count(b"\n"))
        whole = position // CHUNK
        rest = self._files[file].read(whole * CHUNK, position - whole * CHUNK)
        line = counts[whole] + rest.count(b"\n") + 1
        return f"line {line}"


def parse_json(line: bytes) -> Any:
    """What a line of JSON says, or Bad where it is none."""
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError as error:
        bad = decode_utf8(line)
        return bad if isinstance(bad, Bad) else Bad(f"not valid JSON: {error.msg}")


class PlainText(Text):
    """A document a file; its position is 0."""

    @staticmethod
    def fields(path: Path | str | SourceFile, access: Access = LOCAL) -> list[str] | None:
        return None

    def decoded_bytes(self, file: int) -> int:
        return 0  # a file is a document and a block, however large the source

    def documents(self, file: int) -> tuple[np.ndarray, np.ndarray]:
        return self.ranges(file, 2**62)

    def ranges(self, file: int, block_bytes: int) -> tuple[np.ndarray, np.ndarray]:
        starts, stops = self._files[file].cut(2**62)
        return starts[:1], stops[-1:]

    def read(self, file: int, start: int, stop: int) -> list[Record]:
        start, stop = self._files[file].place(start, stop)
        content = self._files.read_exactly(file, start, stop - start)
        lost = self._files[file].corrupt(start, stop)
        return [(start, Bad(lost[0][1]) if lost else content)]

    def decode(self, content: bytes | None) -> str | Bad:
        return decode_utf8(content)

    def place(self, file: int, position: int) -> str:
        return "the whole file"
