"""Lanes: independent streams of packed rows. A lane is the same on whichever rank it runs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from flame.batch import COUNTED, Skip
from flame.data import blocks
from flame.data.mixture import next_source
from flame.data.packing import Piece, pack, pack_whole
from flame.data.plan import DataPlan, Stage
from flame.data.streams import CURSOR, Cursor, Document, Mark, SourceReader, Stream
from flame.data.tokens import PartsEncoder
from flame.data.windows import LANE_COLUMNS, PackedRows, Window, every
from flame.errors import DataError

NEVER = np.iinfo(np.int64).max  # the offset of a cut that is not there
UNKNOWN = 0  # the hash of a window whose files have changed by permission

Documents = list[tuple[int, Document]]  # (source, document)


class Look(NamedTuple):
    """A look at what a source gives next."""

    source: int
    mark: Mark  # the place before it
    found: bool  # whether there was a document; else the source has ended


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
        start, index = self.state(), self.window_index
        stage = self.plan.stage_of(index)
        size = self.plan.steps_in_window(index) * self.plan.lane_rows(index)
        was_cut = [bool(stream.cursor.cut) for stream in self._streams]
        documents, packed, records, skips = self._fill(stage, size)
        rows = self._rows(stage, documents, packed, was_cut)
        digest = hashlib.blake2b(rows.tokens.reshape(-1).data, digest_size=8)
        window_hash = int.from_bytes(digest.digest(), "little", signed=True)
        if self._row:
            self._check_resumed(window_hash, documents)
            before = np.array(start)
            for i, name in enumerate(COUNTED):  # the state had counted them already
                before[every(name)] -= records[:, i]
                for stream, counts in zip(self._streams, records.tolist(), strict=True):
                    setattr(stream.cursor, name, getattr(stream.cursor, name) - counts[i])
            start, self._row = before.tolist(), 0
        self.window_index += 1
        return Window(index, size, rows, start, self.state(), records, skips, window_hash)

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
    ) -> tuple[Documents, list[list[Piece]], np.ndarray, tuple[Skip, ...]]:
        """The window's documents, its rows in their order, the records and the skips."""
        for stream in self._streams:
            stream.longest = stage.max_document_length
            stream.forget()
        before = [s.cursor.counted for s in self._streams]
        take = self._take_whole if self.plan.packing == "document" else self._take_to_cut
        documents, packed = take(stage, rows)
        after = [s.cursor.counted for s in self._streams]
        skips: list[Skip] = []
        for stream in self._streams:
            skips += stream.skips
            stream.skips.clear()
        records = np.array(after, dtype=np.int64) - np.array(before, dtype=np.int64)
        return documents, packed, records, tuple(skips)

    def _take_to_cut(self, stage: Stage, size: int) -> tuple[Documents, list[list[Piece]]]:
        """Rows without padding; where the lane ends, the last one may have some."""
        need = size * stage.sequence_length
        if self.plan.most_tokens is not None:
            need = min(need, self.plan.most_tokens - sum(stream.cursor.tokens for stream in self._streams))
        documents, pieces = self._take_turns(stage, need)
        length, tokens = stage.sequence_length, sum(piece.length for piece in pieces)
        rows = min(size, -(-tokens // length))
        padding = rows * length - tokens
        packed = pack(pieces, length, rows, padding)
        order = self._shuffled(rows - bool(padding))
        return documents, [packed[row] for row in (*order, *range(len(order), rows))]

    def _take_whole(self, stage: Stage, size: int) -> tuple[Documents, list[list[Piece]]]:
        """Rows of whole documents, padded; fewer than `size` only where the lane ends.

        Turns give documents until the window's tokens are over; of these, as many of the first as fit into
        its rows are taken, and the streams go back to where the next one begins.
        """
        looks: list[Look] = []
        documents, pieces = self._take_turns(stage, size * stage.sequence_length, looks)
        packed, count = pack_whole(pieces, stage.sequence_length, size)
        found = [i for i, look in enumerate(looks) if look.found]  # a place for each piece, and one too many
        if count < len(found):
            for look in reversed(looks[1 + found[count - 1] :]):
                self._streams[look.source].back_to(look.mark)
            self._ended = False
        kept = 1 + max((piece.document for piece in pieces[:count]), default=-1)
        used = [row for row in packed if row]
        return documents[:kept], [used[row] for row in self._shuffled(len(used))]

    def _shuffled(self, rows: int) -> list[int]:
        """The order of some rows of the window, or every lane would give its longest documents at once."""
        key = blocks.mix(self.plan.seed, self.lane, self.window_index)
        return blocks.shuffled(rows, key, blocks.name_key("rows")).tolist()

    def _take_turns(
        self, stage: Stage, need: int, looks: list[Look] | None = None
    ) -> tuple[Documents, list[Piece]]:
        """`need` tokens, or all that are left: each turn at most a row's of one document.

        `looks`: no turn is cut short by `need`; the first that would be ends them. Takes all looks at
        streams, that one too.
        """
        length, most = stage.sequence_length, stage.max_document_length
        given = [stream.cursor.phase_tokens for stream in self._streams]
        weights = [0.0 if s.ended else w for s, w in zip(self._streams, stage.weights, strict=True)]
        documents: Documents = []
        pieces: list[Piece] = []
        numbers = [-1] * len(weights)  # of each source's document
        total = sum(weights)
        self._ended = self._ended or not any(weights)
        while need and not self._ended:
            source = next_source(given, weights, length)
            stream = self._streams[source]
            mark = stream.mark() if looks is not None else None
            document = stream.document(int(need * weights[source] / total) + length)
            if looks is not None and mark is not None:
                looks.append(Look(source, mark, document is not None))
            if document is None:
                weights[source] = 0.0
                total = sum(weights)
                self._ended = self.plan.stops_at_source_end or not any(weights)
                continue
            number = numbers[source]
            if number < 0 or documents[number][1] is not document:
                number = numbers[source] = len(documents)
                documents.append((source, document))
            offset = stream.cursor.offset
            turn = min(length, need, len(document.tokens) - offset)
            if looks is not None:
                piece = min(len(document.tokens), (offset // most + 1) * most) - offset
                if piece > need:
                    break
                turn = piece
            end = offset + turn
            while offset < end:
                stop = min(end, (offset // most + 1) * most)
                pieces.append(Piece(number, offset, stop - offset))
                offset = stop
            stream.give(turn)
            given[source] += turn
            need -= turn
        return documents, pieces

    def _rows(
        self, stage: Stage, documents: Documents, packed: list[list[Piece]], was_cut: list[bool]
    ) -> PackedRows:
        """The window's rows. `was_cut`: of each source's first document."""
        length = stage.sequence_length
        zeros = np.zeros(length, dtype=np.int32)
        parts: list[np.ndarray] = []
        for row in packed:
            room = length
            for number, start, count in row:
                parts.append(documents[number][1].tokens[start : start + count])
                room -= count
            if room:
                parts.append(zeros[:room])
        segments = np.array([piece for row in packed for piece in row], dtype=np.int64).reshape(-1, 3)
        bounds = [0, *accumulate(map(len, packed))]
        tokens = np.concatenate([zeros[:0], *parts])
        return PackedRows(
            tokens.reshape(len(packed), length),
            [(self._streams[source].reader, document) for source, document in documents],
            segments,
            bounds,
            self._count(stage, documents, segments, bounds, was_cut),
            bool(len(tokens)) and int(tokens.min()) < 0,
        )

    def _count(
        self,
        stage: Stage,
        documents: Documents,
        segments: np.ndarray,
        bounds: list[int],
        was_cut: list[bool],
    ) -> np.ndarray:
        """Of each row and source the tokens, the documents that begin, and those that are cut for the first
        time, each counted where its first segment ends too early: int64 [rows, sources, 3]."""
        number, offset, length = segments.T
        source = np.array([source for source, _ in documents], dtype=np.int64)
        sizes = np.array([len(document.tokens) for _, document in documents], dtype=np.int64)
        most = stage.max_document_length
        early = offset + length < np.minimum(sizes[number], (offset // most + 1) * most)
        first_cut = np.full(len(documents), NEVER)
        np.minimum.at(first_cut, number[early], offset[early])
        self._note_cuts(source, first_cut, was_cut)
        rows, sources = len(bounds) - 1, len(self._streams)
        cell = np.repeat(np.arange(rows) * sources, np.diff(bounds)) + source[number]
        counted = (length, offset == 0, offset == first_cut[number])
        sums = [np.bincount(cell, weights, rows * sources).astype(np.int64) for weights in counted]
        return np.stack(sums, axis=-1).reshape(rows, sources, 3)

    def _note_cuts(self, source: np.ndarray, first_cut: np.ndarray, was_cut: list[bool]) -> None:
        """Note at each cursor whether its document has been cut, and forget the cuts of a document that had
        been cut before. Each source's first and last document may go on in another window."""
        for i, stream in enumerate(self._streams):
            taken = np.flatnonzero(source == i)
            if not len(taken):
                continue
            stream.cursor.cut |= int(stream.cursor.offset > 0 and first_cut[taken[-1]] < NEVER)
            if was_cut[i]:
                first_cut[taken[0]] = NEVER

    def _check_resumed(self, found: int, documents: Documents) -> None:
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
