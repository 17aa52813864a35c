"""Lanes: independent streams of packed rows. A lane is the same on whichever rank it runs."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from flame.batch import COUNTED, Skip
from flame.data import blocks
from flame.data.documents import Taken, WindowDocuments
from flame.data.hashes import of_bytes, row_hashes, window_hash
from flame.data.mixture import next_source
from flame.data.packing import ROW, pack, pack_whole
from flame.data.plan import DataPlan, Stage
from flame.data.streams import CURSOR, NO_TOKENS, Cursor, Mark, Reading, Stream
from flame.data.tokens import PartsEncoder
from flame.data.walk import SourceReader
from flame.data.windows import LANE_COLUMNS, PackedRows, Window, every
from flame.errors import DataError

NEVER = np.iinfo(np.int64).max  # the offset of a cut that is not there
SPARE = 33 / 32  # of a window is tokenized more than it should take: texts are not all alike
UNKNOWN = 0  # the hash of a window whose files have changed by permission


class Pieces(NamedTuple):
    """What the turns gave, in their order: int64 [pieces] each."""

    source: np.ndarray
    document: np.ndarray  # in its stream's documents
    offset: np.ndarray  # in the document's tokens
    length: np.ndarray

    def first(self, count: int) -> Pieces:
        return Pieces(*(column[:count] for column in self))


class Laid(NamedTuple):
    """Pieces laid out in rows."""

    pieces: Pieces
    placed: np.ndarray  # as `packing` gives it
    order: list[int]  # the packed row that each row of the window is


class Look(NamedTuple):
    """A look at what a source gives next."""

    source: int
    mark: Mark  # the place before it
    found: bool  # whether there was a document; else the source has ended


def read_windows(lanes: Sequence[Lane]) -> list[Reading]:
    """What the next windows of some lanes will take, about, and that is not tokenized yet: of each source."""
    lacks = [lane.lacks() for lane in lanes]
    readings: list[Reading] = []
    for source in range(len(lacks[0])):
        wanted = [(lane.streams[source], of[source]) for lane, of in zip(lanes, lacks, strict=True)]
        wanted = [(stream, tokens) for stream, tokens in wanted if tokens]
        if wanted:
            readings.append(Reading(*zip(*wanted, strict=True)))
    return readings


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
        self.streams: list[Stream] = []
        for i, reader in enumerate(readers):
            first = len(LANE_COLUMNS) + i * len(CURSOR)
            cursor = Cursor() if state is None else Cursor(*state[first : first + len(CURSOR)])
            self.streams.append(Stream(reader, tokenizer, lane, cursor))

    def next_window(self) -> Window:
        """The next window, packed. The first after a resume must be the one that the state saw."""
        self._begin_phase()
        start, index = self.state(), self.window_index
        stage = self.plan.stage_of(index)
        size = self._window_rows()
        was_cut = [bool(stream.cursor.cut) for stream in self.streams]
        laid, documents, records, skips = self._fill(stage, size)
        rows = self._rows(stage, laid, documents, was_cut)
        found = window_hash(rows.hashes)
        if self._row:
            self._check_resumed(found, rows)
            before = np.array(start)
            for i, name in enumerate(COUNTED):  # the state had counted them already
                before[every(name)] -= records[:, i]
                for stream, counts in zip(self.streams, records.tolist(), strict=True):
                    setattr(stream.cursor, name, getattr(stream.cursor, name) - counts[i])
            start, self._row = before.tolist(), 0
        self.window_index += 1
        return Window(index, size, rows, start, self.state(), records, skips, found)

    def lacks(self) -> list[int]:
        """Tokens of each source that the next window will take, about, and that are not tokenized yet."""
        stage = self.plan.stage_of(self.window_index)
        need, length = self._window_rows() * stage.sequence_length, stage.sequence_length
        weights = self._weights(stage)
        total = sum(weights) or 1.0
        wanted = [int(need * weight / total * SPARE) + length if weight else 0 for weight in weights]
        return [max(0, tokens - stream.ahead) for tokens, stream in zip(wanted, self.streams, strict=True)]

    def state(self) -> list[int]:
        """This lane's row of the data state before its next window."""
        values = [self.window_index, 0, 0, int(self._ended)]
        for stream in self.streams:
            values += stream.cursor.values()
        return values

    def _window_rows(self) -> int:
        """Rows that the next window has room for."""
        return self.plan.steps_in_window(self.window_index) * self.plan.lane_rows(self.window_index)

    def _weights(self, stage: Stage) -> list[float]:
        """Of each source, 0 where it has ended."""
        return [0.0 if s.ended else w for s, w in zip(self.streams, stage.weights, strict=True)]

    def _begin_phase(self) -> None:
        """The counters that choose the source start at zero where a phase begins."""
        if self.plan.begins_stage(self.window_index):
            for stream in self.streams:
                stream.cursor.phase_tokens = 0

    def _fill(self, stage: Stage, rows: int) -> tuple[Laid, WindowDocuments, np.ndarray, tuple[Skip, ...]]:
        """The window's pieces in rows, what it took, the records and the skips."""
        for stream in self.streams:
            stream.longest = stage.max_document_length
        before = [stream.cursor.counted for stream in self.streams]
        take = self._take_whole if self.plan.packing == "document" else self._take_to_cut
        laid = take(stage, rows)
        given = np.bincount(laid.pieces.source, laid.pieces.length, len(self.streams)).astype(np.int64)
        taken: list[Taken] = []
        skips: list[Skip] = []
        for stream, tokens in zip(self.streams, given.tolist(), strict=True):
            part, skipped = stream.settle(tokens)
            taken.append(part)
            skips += skipped
        after = [stream.cursor.counted for stream in self.streams]
        records = np.array(after, dtype=np.int64) - np.array(before, dtype=np.int64)
        return laid, WindowDocuments(taken), records, tuple(skips)

    def _take_to_cut(self, stage: Stage, size: int) -> Laid:
        """Rows without padding; where the lane ends, the last one may have some."""
        need = size * stage.sequence_length
        if self.plan.most_tokens is not None:
            need = min(need, self.plan.most_tokens - sum(stream.cursor.tokens for stream in self.streams))
        pieces = self._take_turns(stage, need)
        length, tokens = stage.sequence_length, int(pieces.length.sum())
        rows = min(size, -(-tokens // length))
        padding = rows * length - tokens
        placed = pack(pieces.length, length, rows, padding)
        order = self._shuffled(rows - bool(padding))
        return Laid(pieces, placed, [*order, *range(len(order), rows)])

    def _take_whole(self, stage: Stage, size: int) -> Laid:
        """Rows of whole documents, padded; fewer than `size` only where the lane ends.

        Turns give documents until the window's tokens are over; of these, as many of the first as fit into
        its rows are taken, and the streams go back to where the next one begins.
        """
        looks: list[Look] = []
        pieces = self._take_turns(stage, size * stage.sequence_length, looks)
        placed, count = pack_whole(pieces.length, stage.sequence_length, size)
        found = [i for i, look in enumerate(looks) if look.found]  # a place for each piece, and one too many
        if count < len(found):
            for look in reversed(looks[1 + found[count - 1] :]):
                self.streams[look.source].back_to(look.mark)
            self._ended = False
        used = np.unique(placed[:, ROW]).tolist()
        return Laid(pieces.first(count), placed, [used[row] for row in self._shuffled(len(used))])

    def _shuffled(self, rows: int) -> list[int]:
        """The order of some rows of the window, or every lane would give its longest documents at once."""
        key = blocks.mix(self.plan.seed, self.lane, self.window_index)
        return blocks.shuffled(rows, key, blocks.name_key("rows")).tolist()

    def _take_turns(self, stage: Stage, need: int, looks: list[Look] | None = None) -> Pieces:
        """`need` tokens, or all that are left: each turn at most a row's of one document.

        `looks`: no turn is cut short by `need`; the first that would be ends them. Takes all looks at
        streams, that one too.
        """
        length, most = stage.sequence_length, stage.max_document_length
        given = [stream.cursor.phase_tokens for stream in self.streams]
        weights = self._weights(stage)
        pieces: list[int] = []  # flat: a tuple for each would cost more than its turn
        total = sum(weights)
        self._ended = self._ended or not any(weights)
        while need and not self._ended:
            source = next_source(given, weights, length)
            stream = self.streams[source]
            mark = stream.mark() if looks is not None else None
            left = stream.left(int(need * weights[source] / total) + length)
            if looks is not None and mark is not None:
                looks.append(Look(source, mark, left > 0))
            if not left:
                weights[source] = 0.0
                total = sum(weights)
                self._ended = self.plan.stops_at_source_end or not any(weights)
                continue
            document, offset = stream.at, stream.offset
            turn = min(length, need, left)
            if looks is not None:
                turn = min(left, most - offset % most)
                if turn > need:
                    break
            end = offset + turn
            while offset < end:
                stop = min(end, (offset // most + 1) * most)
                pieces += (source, document, offset, stop - offset)
                offset = stop
            stream.give(turn)
            given[source] += turn
            need -= turn
        return Pieces(*np.array(pieces, dtype=np.int64).reshape(-1, 4).T)

    def _rows(self, stage: Stage, laid: Laid, documents: WindowDocuments, was_cut: list[bool]) -> PackedRows:
        """The window's rows. `was_cut`: of each source's first document."""
        length, (pieces, placed, order) = stage.sequence_length, laid
        place = np.zeros(max(order, default=0) + 1, dtype=np.int64)  # in the window, of each packed row
        place[order] = np.arange(len(order))
        row = place[placed[:, ROW]]
        by_row = np.argsort(row, kind="stable")
        row, (piece, _, start, tokens) = row[by_row], placed[by_row].T
        number = documents.firsts[pieces.source[piece]] + pieces.document[piece]
        offset = pieces.offset[piece] + start
        segments = np.stack([number, offset, tokens], axis=1)
        bounds = np.searchsorted(row, np.arange(len(order) + 1)).tolist()
        ids = documents.pieces(number, offset, tokens)
        room = length - np.bincount(row, tokens, len(order)).astype(np.int64)
        for i in reversed(np.flatnonzero(room).tolist()):
            ids.insert(bounds[i + 1], np.zeros(room[i], dtype=np.int32))
        whole = np.concatenate([NO_TOKENS, *ids]).reshape(len(order), length)
        return PackedRows(
            whole,
            row_hashes(whole),
            documents,
            segments,
            bounds,
            self._count(stage, documents, segments, row, len(order), was_cut),
            bool(len(whole)) and int(whole.min()) < 0,
        )

    def _count(
        self,
        stage: Stage,
        documents: WindowDocuments,
        segments: np.ndarray,
        row: np.ndarray,
        rows: int,
        was_cut: list[bool],
    ) -> np.ndarray:
        """Of each row and source the tokens, the documents that begin, and those that are cut for the first
        time, each counted where its first segment ends too early: int64 [rows, sources, 3]. `row`: of each
        segment."""
        number, offset, length = segments.T
        most, sizes = stage.max_document_length, documents.lengths
        early = offset + length < np.minimum(sizes[number], (offset // most + 1) * most)
        first_cut = np.full(len(sizes), NEVER)
        np.minimum.at(first_cut, number[early], offset[early])
        self._note_cuts(documents.firsts.tolist(), first_cut, was_cut)
        sources = len(self.streams)
        cell = row * sources + documents.sources(number)
        counted = (length, offset == 0, offset == first_cut[number])
        sums = [np.bincount(cell, weights, rows * sources).astype(np.int64) for weights in counted]
        return np.stack(sums, axis=-1).reshape(rows, sources, 3)

    def _note_cuts(self, firsts: list[int], first_cut: np.ndarray, was_cut: list[bool]) -> None:
        """Note at each cursor whether its document has been cut, and forget the cuts of a document that had
        been cut before. Each source's first and last document may go on in another window."""
        for i, (stream, (first, end)) in enumerate(zip(self.streams, pairwise(firsts), strict=True)):
            if first == end:
                continue
            stream.cursor.cut |= int(stream.cursor.offset > 0 and first_cut[end - 1] < NEVER)
            if was_cut[i]:
                first_cut[first] = NEVER

    def _check_resumed(self, found: int, rows: PackedRows) -> None:
        """The open window of a resume must hold the tokens that it held when the state was taken."""
        # a state that an earlier version saved holds the hash of the tokens' bytes
        if self._hash in (found, UNKNOWN) or self._hash == of_bytes(rows.tokens):
            return
        files = rows.documents.paths()
        named = ", ".join(files[:8]) + (", ..." if len(files) > 8 else "")
        raise DataError(
            f"lane {self.lane}: window {self.window_index} does not hold the tokens that it held when the "
            "run was saved: the data or the tokenizer changed. Put the files it reads back as they were: "
            f"{named}"
        )
