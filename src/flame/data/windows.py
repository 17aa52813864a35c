"""Windows: the packed rows of a lane, and the data states after the steps that they are used in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import chain

import numpy as np

from flame.batch import COUNTED, Row, Segment, Skip
from flame.data.chat_tokens import plain_ids
from flame.data.documents import WindowDocuments
from flame.data.plan import DataPlan
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
    the window ends. They are made when the first is asked for: most steps are not saved."""

    def __init__(self, windows: dict[int, Window], lanes: int, columns: int) -> None:
        """`windows`: by lane, those that the state is of; other lanes' states are zero."""
        held = list(windows.values())
        self._shape, self._owned = (lanes, columns), list(windows)
        self._size = held[0].size if held else 0
        self._starts, self._ends = [window.start for window in held], [window.end for window in held]
        self._hashes, self._records = [window.hash for window in held], [window.records for window in held]

    def after(self, rows: int) -> np.ndarray:
        """The state when `rows` rows of each lane, at least one, are used: int64 [lanes, columns]."""
        if rows == self._size:
            return self._ended.copy()
        state = self._begun.copy()
        state[self._owned, ROW] = rows
        return state

    @cached_property
    def _ended(self) -> np.ndarray:
        return self._of_owned(self._ends)

    @cached_property
    def _begun(self) -> np.ndarray:
        """While rows are left, without the number of those used."""
        begun, owned = self._of_owned(self._starts), self._owned
        if not owned:
            return begun
        begun[owned, HASH] = self._hashes
        begun[:, BEGUN] = self._ended[:, BEGUN]
        records = np.zeros((len(begun), *self._records[0].shape), dtype=np.int64)
        records[owned] = self._records
        for i, name in enumerate(COUNTED):  # what a begun window passed has been reported
            begun[:, every(name)] += records[:, :, i]
        return begun

    def _of_owned(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """The rows of the lanes that are owned, among zeros."""
        state = np.zeros(self._shape, dtype=np.int64)
        if rows:
            count = len(rows) * self._shape[1]
            values = np.fromiter(chain.from_iterable(rows), np.int64, count)  # faster than of lists of lists
            state[self._owned] = values.reshape(len(rows), -1)
        return state


class RankWindow:
    """A window of several lanes as one rank sees it: its rows step by step, and what they share."""

    def __init__(
        self,
        windows: dict[int, Window],
        plan: DataPlan,
        places: Sequence[int],
        owned: Sequence[int],
        columns: int,
    ) -> None:
        """`windows`: by lane, those that rows come from. `places`: of the rank's rows in each step. `owned`:
        the lanes that records and states are counted of here."""
        index = next(iter(windows.values())).index
        self.stage, self._lane_rows = plan.stage_of(index), plan.lane_rows(index)
        begun = np.array([window.start[EPOCH] for window in windows.values()], dtype=np.int64)
        self.epochs = begun.min(axis=0)  # int64 [sources]: the smallest over lanes
        self.epoch = int(self.epochs[np.array(self.stage.weights) > 0].min())
        self.states = WindowStates({lane: windows[lane] for lane in owned}, plan.lanes, columns)
        self.records = np.zeros((len(self.epochs), len(COUNTED)), dtype=np.int64)
        for lane in owned:
            self.records += windows[lane].records
        self.skips = tuple(skip for lane in owned for skip in windows[lane].skips)
        # of each place in a step: its lane's rows, their hashes, which of the lane's rows, and the place
        self._places: list[tuple[PackedRows, list[int], int, int]] = []
        self._sources = np.zeros((plan.steps_in_window(index), len(self.epochs), 3), dtype=np.int64)
        hashes = {lane: window.rows.hashes.tolist() for lane, window in windows.items()}
        for place in places:
            number, lane = divmod(place, plan.lanes)
            rows = windows[lane].rows
            self._places.append((rows, hashes[lane], number, place))
            found = rows.sources[number :: self._lane_rows]
            self._sources[: len(found)] += found

    def rows(self, step: int, first: int) -> tuple[list[Row], list[int], np.ndarray]:
        """The rows of the window's `step`-th step, their hashes, and `StepRows.sources`. `first`: the global
        number of that step's first row."""
        used = step * self._lane_rows
        rows: list[Row] = []
        found: list[int] = []
        for packed, hashes, number, place in self._places:
            if used + number < len(hashes):  # else the lane has ended
                rows.append(packed.row(used + number, first + place))
                found.append(hashes[used + number])
        return rows, found, self._sources[step]

    def take_state(self, step: int) -> Callable[[], np.ndarray]:
        """What gives the data state after that step."""
        return partial(self.states.after, (step + 1) * self._lane_rows)
