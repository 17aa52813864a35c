"""Plain text, a document a paragraph."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from flame.data.cache import Access
from flame.data.formats import Bad, Record, decode_utf8
from flame.data.lines import Text
from flame.data.raw import SourceFile

BLANK = rb"[ \t\r\f\v]*\n"  # a line of white space alone
SEPARATOR = re.compile(rb"\r?\n(?:" + BLANK + rb")+")  # a line's end and the blank lines behind it
LEADING = re.compile(rb"(?:" + BLANK + rb")+")
SPACE = b" \t\r\n\f\v"
LOOK_BACK = 256  # bytes read before a range, which may begin in the middle of a paragraph


class Paragraphs(Text):
    """Paragraphs are separated by lines of white space alone. Ranges are in bytes; a paragraph belongs to
    where its first line begins, and its text has no line end after its last line."""

    @staticmethod
    def fields(path: Path | str | SourceFile, access: Access) -> list[str] | None:
        return None

    def documents(self, file: int) -> tuple[np.ndarray, np.ndarray]:
        size = self._files[file].size()
        found = [(at, at + len(content)) for at, content in self._paragraphs(file, 0, size)]
        found += [(at, at + 1) for at, _ in self._files[file].corrupt(0, size)]
        bounds = np.array(sorted(found), dtype=np.int64).reshape(-1, 2)
        return bounds[:, 0], bounds[:, 1]

    def ranges(self, file: int, block_bytes: int) -> tuple[np.ndarray, np.ndarray]:
        return self._files[file].cut(block_bytes)

    def read(self, file: int, start: int, stop: int) -> list[Record]:
        start, stop = self._files[file].place(start, stop)
        found: list[Record] = list(self._paragraphs(file, start, stop))
        lost = [(at, Bad(reason)) for at, reason in self._files[file].corrupt(start, stop)]
        return sorted([*found, *lost], key=lambda record: record[0]) if lost else found

    def decode(self, content: bytes | None) -> str | Bad:
        return decode_utf8(content)

    def place(self, file: int, position: int) -> str:
        return f"byte {position}"

    def _paragraphs(self, file: int, start: int, stop: int) -> Iterator[tuple[int, bytes]]:
        """The paragraphs that begin in a range: (position, bytes)."""
        if start == stop:
            return
        first = self._last_printed(file, start)
        content = self._to_its_end(file, first, stop)
        at = 0
        if first == 0:  # nothing but white space comes before, or the file begins here
            leading = LEADING.match(content)
            at = leading.end() if leading else 0
        while at < len(content) and first + at < stop:
            separator = SEPARATOR.search(content, at)
            end = separator.start() if separator else len(content)
            # what begins before the range is the end of an earlier paragraph, or the range before has it
            if first + at >= start and (text := content[at:end]).strip(SPACE):
                yield first + at, text
            at = separator.end() if separator else end

    def _last_printed(self, file: int, start: int) -> int:
        """The position of the last byte before `start` that is no white space; 0 where there is none."""
        length = LOOK_BACK
        while start:
            first = max(0, start - length)
            printed = len(self._files.read_exactly(file, first, start - first).rstrip(SPACE))
            if printed:
                return first + printed - 1
            if not first:
                break
            length *= 8
        return 0

    def _to_its_end(self, file: int, first: int, stop: int) -> bytes:
        """The bytes from `first` to the end of the last paragraph that begins before `stop`."""
        content = self._files.read_exactly(file, first, stop - first)
        searched, size = stop - 1 - first, LOOK_BACK
        while True:
            separator = SEPARATOR.search(content, searched)
            if separator:
                return content[: separator.end()]
            more = self._files[file].read(first + len(content), size)
            content += more
            if len(more) < size:
                separator = SEPARATOR.search(content, searched)
                return content[: separator.end()] if separator else _without_last_end(content)
            size *= 2


def _without_last_end(content: bytes) -> bytes:
    """What ends a file, without its last line end and the white space behind it."""
    printed = len(content.rstrip(SPACE))
    newline = content.find(b"\n", printed)
    if newline < 0:
        return content
    return content[: newline - (newline > printed and content[newline - 1 : newline] == b"\r")]
