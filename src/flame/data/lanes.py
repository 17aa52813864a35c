"""Lanes: independent streams of packed rows. A lane is the same on whichever rank it runs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flame.batch import Segment, Skip
from flame.data import blocks
from flame.data.mixture import next_source
from flame.data.packing import Piece, pack
from flame.data.plan import DataPlan, Stage
from flame.data.streams import CURSOR, Cursor, Document, SourceReader, Stream
from flame.data.tokens import PartsEncoder
from flame.errors import DataError

LANE_COLUMNS = ("window", "row", "window_hash", "ended")  # then CURSOR for each source
UNKNOWN = 0  # the hash of a window whose files have changed by permission
RECORDS = CURSOR.index("records") - len(CURSOR)
COUNTED = slice(RECORDS, RECORDS + 3)  # records, skipped, held_out


def state_columns(sources: Sequence[str]) -> list[str]:
    """The names of the columns of the data state."""
    return [*LANE_COLUMNS, *(f"{source}.{name}" for source in sources for name in CURSOR)]


@dataclass(frozen=True, slots=True)
class PackedRow:
    """One row of a lane; its segments are all of it, unless it is the lane's last row: padding follows."""

    tokens: np.ndarray  # int32 [L]
    segments: tuple[Segment, ...]
    sources: np.ndarray  # int64 [sources, 3]: as in flame.batch.StepRows


@dataclass(frozen=True, slots=True)
class Window:
    """The packed rows of a lane's window and what it took from the sources."""

    index: int
    size: int  # rows that the window has room for
    rows: tuple[PackedRow, ...]  # fewer where the lane ends
    ended: bool  # whether the lane had ended before
    start: tuple[Cursor, ...]  # of each source
    records: np.ndarray  # int64 [sources, 3]: records passed, and of them skipped and held out
    skips: tuple[Skip, ...]
    hash: int  # int64, of all tokens
    end: tuple[int, ...]  # the lane's row of the data state when all rows are used

    def state(self, row: int) -> list[int]:
        """The lane's row of the data state when `row` rows of this window are used; at 0 it is not begun."""
        if row == self.size:
            return list(self.end)
        values = [self.index, row, self.hash if row else 0, int(self.ended)]
        for cursor, counted in zip(self.start, self.records.tolist(), strict=True):
            values += cursor.values()
            if row:  # what a begun window passed has been reported
                values[-1] = self.end[len(values) - 1]
                values[COUNTED] = [a + b for a, b in zip(values[COUNTED], counted, strict=True)]
        return values


class Lane:
    """One lane: fills windows of rows from its sources' streams."""

    def __init__(
        self,
        plan: DataPlan,
        readers: Sequence[SourceReader],
        tokenizer: PartsEncoder,
        lane: int,
        state: Sequence[int] | None = None,
    ) -> None:
        """`state`: this lane's row of a data state; None: a fresh run."""
        self.plan, self.lane = plan, lane
        self.window_index, self._row, self._hash, ended = (0, 0, 0, 0) if state is None else state[:4]
        self._ended = bool(ended)
        self._streams: list[Stream] = []
        for i, reader in enumerate(readers):
            first = len(LANE_COLUMNS) + i * len(CURSOR)
            cursor = Cursor() if state is None else Cursor(*state[first : first + len(CURSOR)])
            self._streams.append(Stream(reader, tokenizer, lane, cursor))

    def next_window(self) -> Window:
        """The next window, packed. The first after a resume must be the one that the state saw."""
        self._begin_phase()
        start = tuple(Cursor(*stream.cursor.values()) for stream in self._streams)
        index, ended = self.window_index, self._ended
        stage = self.plan.stage_of(index)
        size = self.plan.steps_in_window(index) * self.plan.lane_rows(index)
        was_cut = [bool(cursor.cut) for cursor in start]
        documents, pieces, records, skips = self._fill(stage, size)
        made = self._rows(stage, size, documents, pieces, was_cut)
        digest = hashlib.blake2b(digest_size=8)
        for row in made:
            digest.update(row.tokens.data)
        window_hash = int.from_bytes(digest.digest(), "little", signed=True)
        if self._row:
            self._check_resumed(window_hash, documents)
            for cursors in (start, [stream.cursor for stream in self._streams]):
                for cursor, (passed, skipped, held_out) in zip(cursors, records.tolist(), strict=True):
                    cursor.records -= passed  # the state had counted them already
                    cursor.skipped -= skipped
                    cursor.held_out -= held_out
            self._row = 0
        self.window_index += 1
        return Window(index, size, made, ended, start, records, skips, window_hash, tuple(self.state()))

    def state(self) -> list[int]:
        """This lane's row of the data state before its next window."""
        values = [self.window_index, 0, 0, int(self._ended)]
        for stream in self._streams:
            values += stream.cursor.values()
        return values

    def _begin_phase(self) -> None:
        """The counters that choose the source start at zero where a phase begins."""
        if self.plan.begins_stage(self.window_index):
            for stream in self._streams:
                stream.cursor.phase_tokens = 0

    def _fill(
        self, stage: Stage, rows: int
    ) -> tuple[list[tuple[int, Document]], list[Piece], np.ndarray, tuple[Skip, ...]]:
        """Exactly the window's tokens, or all that are left, turn by turn: the documents as (source,
        document), their pieces, the records and the skips."""
        length, most = stage.sequence_length, stage.max_document_length
        before = [s.cursor.counted for s in self._streams]
        given = [stream.cursor.phase_tokens for stream in self._streams]
        weights = [0.0 if s.ended else w for s, w in zip(self._streams, stage.weights, strict=True)]
        documents: list[tuple[int, Document]] = []
        numbers: dict[int, int] = {}  # of the documents, by identity
        pieces: list[Piece] = []
        need = rows * length
        self._ended = self._ended or not any(weights)
        while need and not self._ended:
            source = next_source(given, weights, length)
            stream = self._streams[source]
            document = stream.document(int(need * weights[source] / sum(weights)) + length)
            if document is None:
                weights[source] = 0.0
                self._ended = self.plan.stops_at_source_end or not any(weights)
                continue
            number = numbers.setdefault(id(document), len(documents))
            if number == len(documents):
                documents.append((source, document))
            offset = stream.cursor.offset
            turn = min(length, need, len(document.tokens) - offset)
            end = offset + turn
            while offset < end:
                stop = min(end, (offset // most + 1) * most)
                pieces.append(Piece(number, offset, stop - offset))
                offset = stop
            stream.give(turn)
            given[source] += turn
            need -= turn
        after = [s.cursor.counted for s in self._streams]
        skips: list[Skip] = []
        for stream in self._streams:
            skips += stream.skips
            stream.skips.clear()
        return (
            documents,
            pieces,
            np.array(after, dtype=np.int64) - np.array(before, dtype=np.int64),
            tuple(skips),
        )

    def _rows(
        self,
        stage: Stage,
        size: int,
        documents: list[tuple[int, Document]],
        pieces: list[Piece],
        was_cut: list[bool],
    ) -> tuple[PackedRow, ...]:
        """The pieces as rows in their final order; a row with padding is the last. `was_cut`: of each
        source's first document."""
        length, tokens = stage.sequence_length, sum(piece.length for piece in pieces)
        rows = min(size, -(-tokens // length))
        padding = rows * length - tokens
        packed = pack(pieces, length, rows, padding)
        key = blocks.mix(self.plan.seed, self.lane, self.window_index)
        order = blocks.shuffled(rows - bool(padding), key, blocks.name_key("rows")).tolist()
        if padding:
            order.append(rows - 1)
        cuts = self._count_cuts(stage, documents, packed, was_cut)
        return tuple(self._row_of(stage, packed[i], documents, cuts) for i in order)

    def _count_cuts(
        self,
        stage: Stage,
        documents: list[tuple[int, Document]],
        packed: list[list[Piece]],
        was_cut: list[bool],
    ) -> dict[int, int]:
        """The documents that are cut here for the first time, and at which offset the segment begins that
        ends too early. Notes at each cursor whether its document has been cut."""
        most = stage.max_document_length
        cuts: dict[int, int] = {}
        for number, offset, length in (piece for row in packed for piece in row):
            if offset + length < min(len(documents[number][1].tokens), (offset // most + 1) * most):
                cuts[number] = min(offset, cuts.get(number, offset))
        numbers = {source: number for number, (source, _) in enumerate(documents)}  # each source's last
        for source, number in numbers.items():
            cursor = self._streams[source].cursor
            cursor.cut |= int(cursor.offset > 0 and number in cuts)
        first = {source: number for number, (source, _) in reversed(list(enumerate(documents)))}
        for source, number in first.items():
            if was_cut[source]:
                cuts.pop(number, None)
        return cuts

    def _row_of(
        self,
        stage: Stage,
        pieces: list[Piece],
        documents: list[tuple[int, Document]],
        cuts: dict[int, int],
    ) -> PackedRow:
        segments: list[Segment] = []
        counts = np.zeros((len(self._streams), 3), dtype=np.int64)
        for number, offset, length in pieces:
            source, document = documents[number]
            reader = self._streams[source].reader
            name = reader.document_id(document)
            segments.append(Segment(reader.source.name, document.epoch, name, offset, length))
            counts[source] += (length, offset == 0, cuts.get(number) == offset)
        parts = [documents[n][1].tokens[offset : offset + length] for n, offset, length in pieces]
        padding = np.zeros(stage.sequence_length - sum(map(len, parts)), dtype=np.int32)
        return PackedRow(np.concatenate([*parts, padding]), tuple(segments), counts)

    def _check_resumed(self, found: int, documents: list[tuple[int, Document]]) -> None:
        """The open window of a resume must hold the tokens that it held when the state was taken."""
        if self._hash in (found, UNKNOWN):
            return
        readers = ((self._streams[source].reader, document) for source, document in documents)
        files = list(dict.fromkeys(str(r.source.files[document.file].path) for r, document in readers))
        named = ", ".join(files[:8]) + (", ..." if len(files) > 8 else "")
        raise DataError(
            f"lane {self.lane}: window {self.window_index} does not hold the tokens that it held when the "
            "run was saved: the data or the tokenizer changed. Put the files it reads back as they were: "
            f"{named}"
        )
