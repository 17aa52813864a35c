"""What every file format can do. Its classes lie in `lines` and `tables`; `sources.FORMATS` lists them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from flame.data.cache import Access
from flame.data.raw import SourceFile


class Bad(NamedTuple):
    """Why a record holds no text."""

    reason: str


Content = bytes | np.ndarray | Bad | None  # of a record: undecoded, token ids, or why it cannot be had
Record = tuple[int, Content]  # with its position


class Format(Protocol):
    """How the files of one source are read. Raises DataError on what cannot be read."""

    def __init__(self, paths: Sequence[SourceFile], field: str, access: Access) -> None: ...

    @staticmethod
    def fields(path: SourceFile, access: Access) -> list[str] | None:
        """The names that may hold the text; None where the file is text. Opens the file once."""
        ...

    def decoded_bytes(self, file: int) -> int:
        """The size of the file's text, nearly."""
        ...

    def documents(self, file: int) -> tuple[np.ndarray, np.ndarray]:
        """The range of each record: (starts, stops), int64."""
        ...

    def ranges(self, file: int, block_bytes: int) -> tuple[np.ndarray, np.ndarray]:
        """Ranges of about `block_bytes` of text that together hold every record once."""
        ...

    def read(self, file: int, start: int, stop: int) -> list[Record]:
        """The records that begin in a range, undecoded: (position in the file, content)."""
        ...

    def expect(self, file: int, start: int, stop: int) -> None:
        """A range will be read soon: where the files are remote, begin to fetch it."""
        ...

    def decode(self, content: bytes | None) -> str | Bad:
        """A record's text, or why there is none: a fact of its bytes alone."""
        ...

    def place(self, file: int, position: int) -> str:
        """Where a record is, for people."""
        ...


def text_of(reader: Format, content: Content) -> str | np.ndarray | Bad:
    """The text or the token ids (as `ids.checked` gives them) of what a format read, or why there is none; a
    corrupt range says so itself."""
    return content if isinstance(content, (Bad, np.ndarray)) else reader.decode(content)


def decode_utf8(content: bytes | None) -> str | Bad:
    """Text of UTF-8 bytes, or why there is none."""
    if content is None:
        return Bad("no text: null")
    try:
        return content.decode() or Bad("empty text")
    except UnicodeDecodeError as error:
        return Bad(f"invalid UTF-8 at byte {error.start}")
