"""Windows: the packed rows of a lane, and the data states after the steps that they are used in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np

from flame.batch import COUNTED, Row, Segment, Skip
from flame.data.chat_tokens import plain_ids
from flame.data.documents import WindowDocuments
from flame.data.streams import CURSOR

LANE_COLUMNS = ("window", "row", "window_hash", "ended")  # then CURSOR for each source
ROW, HASH = LANE_COLUMNS.index("row"), LANE_COLUMNS.index("window_hash")


def state_columns(sources: Sequence[str]) -> list[str]:
    """The names of the columns of the data state."""
    return [*LANE_COLUMNS, *(f"{source}.{name}" for source in sources for name in CURSOR)]


def every(name: str) -> slice:
    """The columns of the data state that hold one field of all sources' cursors."""
    return slice(len(LANE_COLUMNS) + CURSOR.index(name), None, len(CURSOR))


EPOCH, BEGUN = every("epoch"), every("begun")


@dataclass(frozen=True, slots=True)
class PackedRows:
    """Rows of a lane, in order. Padding follows on the segments of a row where they do not fill it."""

    tokens: np.ndarray  # int32 [rows, L]; a token without loss is written as its complement
    hashes: np.ndarray  # uint64 [rows]: of the tokens as they are here
    documents: WindowDocuments
    segments: np.ndarray  # int64 [segments, 3]: the number of the document, offset and length
    bounds: Sequence[int]  # rows + 1: the first segment of each row, and the end
    sources: np.ndarray  # int64 [rows, sources, 3]: as in flame.batch.StepRows
    masked: bool  # whether some token has no loss

    def __len__(self) -> int:
        return len(self.tokens)

    def row(self, number: int, index: int) -> Row:
        """One of the rows. `index`: in the global order."""
        lengths = self.segments[self.bounds[number] : self.bounds[number + 1], 2]
        tokens, names = self.tokens[number], partial(self.named, number)
        if not self.masked:
            return Row(index, tokens, lengths, names)
        return Row(index, plain_ids(tokens), lengths, names, tokens >= 0)

    def named(self, number: int) -> tuple[Segment, ...]:
        """The segments of a row by name."""
        segments = self.segments[self.bounds[number] : self.bounds[number + 1]].tolist()
        return tuple(self.documents.segment(*segment) for segment in segments)


@dataclass(frozen=True, slots=True)
class Window:
    """The rows of a lane's window and what it took from the sources."""

    index: int
    size: int  # rows that the window has room for
    rows: PackedRows  # fewer where the lane ends
    start: Sequence[int]  # the lane's row of the data state when no row is used
    end: Sequence[int]  # and when all are
    records: np.ndarray  # int64 [sources, 4]: as in flame.batch.StepRows
    skips: tuple[Skip, ...]
    hash: int  # int64, of all tokens


class WindowStates:
    """The data states after the steps of one window. They differ in the rows used and in nothing else, until
    the window ends."""

    def __init__(self, windows: dict[int, Window], lanes: int, columns: int) -> None:
        """`windows`: by lane, those that the state is of; other lanes' states are zero."""
        held = list(windows.values())
        self._size = held[0].size if held else 0
        self._begun, self._end = np.zeros((2, lanes, columns), dtype=np.int64)
        self._is_owned = np.zeros(lanes, dtype=np.int64)
        if not held:
            return
        shape = len(held), columns
        end = np.fromiter(chain.from_iterable(w.end for w in held), np.int64).reshape(shape)
        begun = np.fromiter(chain.from_iterable(w.start for w in held), np.int64).reshape(shape)
        records = np.concatenate([window.records for window in held]).reshape(len(held), -1, len(COUNTED))
        begun[:, HASH] = [window.hash for window in held]
        for i, name in enumerate(COUNTED):  # what a begun window passed has been reported
            begun[:, every(name)] += records[:, :, i]
        begun[:, BEGUN] = end[:, BEGUN]
        owned = list(windows)
        self._begun[owned], self._end[owned], self._is_owned[owned] = begun, end, 1

    def after(self, rows: int) -> np.ndarray:
        """The state when `rows` rows of each lane, at least one, are used: int64 [lanes, columns]."""
        if rows == self._size:
            return self._end.copy()
        state = self._begun.copy()
        state[:, ROW] = self._is_owned * rows
        return state
