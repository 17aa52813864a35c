"""Documents of one stream as columns: one object for all of them, because one for each costs more than its
tokens do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from flame.batch import Segment, Skip
from flame.data.formats import Bad
from flame.data.sources import document_id
from flame.data.walk import Item, SourceReader


@dataclass(slots=True)
class Documents:
    """Documents, and parts of long ones, in the order of their stream: columns of one length."""

    epochs: list[int] = field(default_factory=list[int])
    groups: list[int] = field(default_factory=list[int])
    numbers: list[int] = field(default_factory=list[int])  # in the group
    files: list[int] = field(default_factory=list[int])
    positions: list[int] = field(default_factory=list[int])  # of the record in its file
    parts: list[int | None] = field(default_factory=list["int | None"])  # where the text was split
    ends_record: list[bool] = field(default_factory=list[bool])
    bad: list[Bad | None] = field(default_factory=list["Bad | None"])  # why there is no text
    lengths: list[int] = field(default_factory=list[int])  # in tokens

    def __len__(self) -> int:
        return len(self.lengths)

    def add(self, items: Sequence[Item], lengths: Sequence[int]) -> None:
        """Append some. `lengths`: their tokens."""
        *columns, held = zip(*items, strict=True)
        bad = [what if isinstance(what, Bad) else None for what in held]
        for name, values in zip(self.__slots__, (*columns, bad, lengths), strict=True):
            getattr(self, name).extend(values)

    def take(self, count: int, passed: int) -> Documents:
        """The first `count`; of these, the first `passed` are held here no more."""
        columns = [getattr(self, name) for name in self.__slots__]
        taken = Documents(*[column[:count] for column in columns])
        for column in columns:
            del column[:passed]
        return taken

    def id(self, reader: SourceReader, i: int) -> str:
        """What one of them is called in its source."""
        return document_id(reader.source.files[self.files[i]].name, self.positions[i], self.parts[i])

    def skip(self, reader: SourceReader, i: int, reason: str) -> Skip:
        """The name of one that is not trained."""
        file = str(reader.source.files[self.files[i]].path)
        place = reader.format.place(self.files[i], self.positions[i])
        return Skip(reader.source.name, self.epochs[i], self.id(reader, i), file, place, reason)

    def segment(self, reader: SourceReader, i: int, offset: int, length: int) -> Segment:
        """The name of a piece of one."""
        return Segment(reader.source.name, self.epochs[i], self.id(reader, i), offset, length)


@dataclass(frozen=True, slots=True)
class Taken:
    """What a window took from one source."""

    reader: SourceReader
    documents: Documents  # passed or begun, those without text too
    tokens: np.ndarray  # int32: of all of them, one after another


class WindowDocuments:
    """What a window took from its sources, numbered through source by source."""

    def __init__(self, taken: Sequence[Taken]) -> None:
        """`taken`: of each source."""
        self._taken = taken
        self.firsts = np.cumsum([0, *(len(part.documents) for part in taken)])  # int64 [sources + 1]: the
        # number of each one's first document, and the end
        self.lengths = np.array([n for part in taken for n in part.documents.lengths], dtype=np.int64)
        self._starts = np.cumsum(self.lengths) - self.lengths  # in the tokens of all
        self._tokens = taken[0].tokens if len(taken) == 1 else np.concatenate([part.tokens for part in taken])

    def sources(self, numbers: np.ndarray) -> np.ndarray:
        """The sources of some documents: int64."""
        return np.searchsorted(self.firsts, numbers, side="right") - 1

    def pieces(self, numbers: np.ndarray, offsets: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
        """The tokens of pieces of documents: views."""
        starts = self._starts[numbers] + offsets
        tokens = self._tokens
        return [tokens[a:b] for a, b in zip(starts.tolist(), (starts + lengths).tolist(), strict=True)]

    def segment(self, number: int, offset: int, length: int) -> Segment:
        """The name of a piece of a document."""
        source = int(self.sources(np.array(number)))
        part = self._taken[source]
        return part.documents.segment(part.reader, number - int(self.firsts[source]), offset, length)

    def paths(self) -> list[str]:
        """The files that the documents lie in."""
        found = (part.reader.source.files[i].path for part in self._taken for i in part.documents.files)
        return list(dict.fromkeys(str(path) for path in found))
