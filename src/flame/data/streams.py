"""A stream: the documents of one source in one lane, tokenized ahead and given piece by piece, from any
cursor on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import NamedTuple, cast

import numpy as np

from flame.batch import COUNTED, Skip
from flame.data.documents import Documents, Taken
from flame.data.encoders import Finish
from flame.data.ids import BYTES_PER_ID, with_ends
from flame.data.tokens import PartsEncoder
from flame.data.walk import EXHAUSTED, HELD_OUT, Item, SourceReader, Walk
from flame.errors import DataError

CURSOR = (
    "epoch",
    "group",
    "document",
    "offset",
    "tokens",
    "phase_tokens",
    "records",
    "skipped",
    "held_out",
    "overlong",
    "cut",
    "begun",
)
BATCH_BYTES = 8 * 2**20  # most text tokenized in one call
NO_TOKENS = np.zeros(0, dtype=np.int32)
NO_STOPS = np.zeros(0, dtype=np.int64)

_cursor_values = attrgetter(*CURSOR)
_cursor_counts = attrgetter(*COUNTED)


@dataclass(slots=True)
class Cursor:
    """A place in a stream, and what it gave until there. It fixes all that follows."""

    epoch: int = 0
    group: int = 0  # of G blocks of this lane
    document: int = 0  # in the group's permuted documents
    offset: int = 0  # in the document's tokens
    tokens: int = 0  # given in all
    phase_tokens: int = 0  # given since the weights last changed
    records: int = 0  # passed in all, the skipped ones included
    skipped: int = 0  # of them, records without text
    held_out: int = 0  # of them, documents for validation
    overlong: int = 0  # of them, documents longer than max_document_length
    cut: int = 0  # 1 where the document here has been cut already
    begun: int = 0  # the last epoch that was begun, at the end of the window that is open

    @property
    def counted(self) -> tuple[int, ...]:
        """In the order of `COUNTED`."""
        return _cursor_counts(self)

    def values(self) -> list[int]:
        """In the order of `CURSOR`."""
        return list(_cursor_values(self))


class Mark(NamedTuple):
    """A place in a stream to go back to."""

    at: int
    offset: int
    over: bool


class Stream:
    """Documents of one source in one lane. `left` looks, `give` moves, and `settle` ends a window: the cursor
    moves there only then. All are exact whatever was read and tokenized ahead."""

    def __init__(self, reader: SourceReader, tokenizer: PartsEncoder, lane: int, cursor: Cursor) -> None:
        self.reader, self.lane, self.cursor = reader, lane, cursor
        self.longest = reader.plan.stages[0].max_document_length  # in tokens; what is longer is overlong
        self.documents = Documents()  # from the one at the cursor on, as far as they are tokenized
        self.at, self.offset = (
            0,
            cursor.offset,
        )  # where the next piece begins: a document of them, a token of it
        self._tokenizer = tokenizer
        self._tokens: list[np.ndarray] = []  # of `documents`, one after another
        self._walk = iter(Walk(reader, lane, cursor.epoch, cursor.group, cursor.document))
        self._over = False  # the last epoch has ended
        self._cuts = reader.plan.overlong == "cut"
        self._given_epoch = cursor.epoch  # of the last document that was not too long

    @property
    def ended(self) -> bool:
        """Whether the source has given all that it has for this lane."""
        return self.reader.max_epochs is not None and self.cursor.epoch >= self.reader.max_epochs

    def left(self, expected_tokens: int) -> int:
        """Tokens that are left of the document here; records without text are passed on the way.

        0 where `max_epochs` are over. `expected_tokens`: about as many will be asked for soon; it only
        sizes what is tokenized at once. Raises DataError where nothing of the source is text.
        """
        lengths = self.documents.lengths
        while True:
            if self.at == len(lengths):
                reading = Reading([self], [expected_tokens])
                if not len(reading):
                    self._over = True
                    return 0
                reading.tokenize(self._tokenizer).append()
            length = lengths[self.at]
            if length and (self._cuts or self._takes(length)):
                return length - self.offset
            if self.documents.bad[self.at] is EXHAUSTED:
                raise DataError(
                    f'source "{self.reader.source.name}": lane {self.lane} read as many records as the '
                    f"source holds and found {self._why_none()}"
                )
            self.at += 1

    def give(self, tokens: int) -> None:
        """Move on by `tokens` of the document here."""
        self.offset += tokens
        if self.offset == self.documents.lengths[self.at]:
            self.at, self.offset = self.at + 1, 0

    def mark(self) -> Mark:
        """This place, to go back to within the window."""
        return Mark(self.at, self.offset, self._over)

    def back_to(self, mark: Mark) -> None:
        """Take back all that was given and passed since a mark."""
        self.at, self.offset, self._over = mark

    # -------------------------------------------------------------------------- the end of a window

    def settle(self, tokens: int) -> tuple[Taken, list[Skip]]:
        """What was passed or begun since the last time, and the names of what is skipped of it. The cursor
        moves behind it. `tokens`: that were given of it."""
        cursor, at = self.cursor, self.at
        begun = min(at + (self.offset > 0), len(self.documents))  # a resumed one may not have been looked at
        taken = self.documents.take(begun, at)
        skips = self._count(taken, at)
        if begun:
            cursor.epoch, cursor.group = taken.epochs[-1], taken.groups[-1]
            cursor.document = taken.numbers[-1] + (begun == at)
            cursor.begun = cursor.epoch
        if self._over:
            assert self.reader.max_epochs is not None
            cursor.epoch, cursor.group, cursor.document = self.reader.max_epochs, 0, 0
        if at:
            cursor.cut = 0
        cursor.offset = self.offset
        cursor.tokens += tokens
        cursor.phase_tokens += tokens
        held = self._tokens[0] if len(self._tokens) == 1 else np.concatenate([NO_TOKENS, *self._tokens])
        self._tokens, self.at = [held[sum(taken.lengths[:at]) :]], 0
        return Taken(self.reader, taken, held[: sum(taken.lengths)]), skips

    def _count(self, taken: Documents, passed: int) -> list[Skip]:
        """Count at the cursor what was passed, and the overlong ones of what was begun; name the skips."""
        cursor, reader = self.cursor, self.reader
        cursor.records += sum(taken.ends_record[:passed])
        reasons = {i: bad.reason for i, bad in enumerate(taken.bad[:passed]) if bad and bad is not HELD_OUT}
        cursor.skipped += len(reasons)
        cursor.held_out += taken.bad[:passed].count(HELD_OUT)
        if max(taken.lengths, default=0) > self.longest or taken.parts.count(None) < len(taken):
            self._count_overlong(taken, reasons)
        return [taken.skip(reader, i, reasons[i]) for i in sorted(reasons)]

    def _count_overlong(self, taken: Documents, reasons: dict[int, str]) -> None:
        """Those of what was begun; where they are skipped, why, into `reasons`."""
        cursor = self.cursor
        first = int(cursor.offset > 0)  # its own length was judged when it began
        for i, length in enumerate(taken.lengths[first:], first):
            part = taken.parts[i]
            overlong = length > self.longest or (part is not None and length > 0 and not self._cuts)
            if overlong and not part:
                cursor.overlong += 1
                if not self._cuts:
                    reasons[i] = self._too_long(taken, i)

    # ------------------------------------------------------------------------------ looking ahead

    def _takes(self, length: int) -> bool:
        """Whether the document here is trained, where one that is too long is not."""
        documents, at, what = self.documents, self.at, self.reader.plan.overlong
        epoch = documents.epochs[at]
        if self.offset or not (documents.parts[at] is not None or length > self.longest):
            self._given_epoch = epoch
            return True
        skip = documents.skip(self.reader, at, self._too_long(documents, at))
        where = f'source "{skip.source}": '
        if what == "error":
            raise DataError(
                f"{where}{skip.file}, {skip.place}: {skip.reason}; raise that, or set overlong "
                'to "cut" or "skip"'
            )
        if epoch - self._given_epoch > self.reader.plan.lanes:
            raise DataError(
                f"{where}lane {self.lane} read as many records as the source holds, and all "
                f"are too long; the last: {skip.file}, {skip.place}: {skip.reason}"
            )
        return False

    def _too_long(self, documents: Documents, i: int) -> str:
        found = "more than 1 MiB" if documents.parts[i] is not None else f"{documents.lengths[i]} tokens"
        return f"{found}, longer than max_document_length = {self.longest}"

    def _why_none(self) -> str:
        passed = self.documents.bad[: self.at]
        if self.cursor.held_out or HELD_OUT in passed:
            return "none to train on; all are held out: lower validation.fraction"
        i = max((i for i, bad in enumerate(passed) if bad), default=-1)
        bad = passed[i] if i >= 0 else None
        if bad is None:
            return "no text in any of them"
        last = self.documents.skip(self.reader, i, bad.reason)
        return f"no text in any of them; the last: {last.file}, {last.place}: {last.reason}"

    def read(self, tokens: int) -> list[Item]:
        """The next documents: about as many tokens, at least one document unless there is none."""
        wanted = min(BATCH_BYTES, tokens * self.reader.bytes_per_token)
        items: list[Item] = []
        length = 0
        for item in self._walk:
            items.append(item)
            held = item[-1]
            if isinstance(held, str):
                length += len(held)
            elif isinstance(held, np.ndarray):
                length += BYTES_PER_ID * len(held)
            elif held is EXHAUSTED:
                break
            if length >= wanted:
                break
        return items

    def append(self, items: list[Item], tokens: np.ndarray, lengths: list[int]) -> None:
        """Take what was read, and its tokens: int32, `lengths` of each item."""
        self._tokens.append(tokens)
        self.documents.add(items, lengths)

    @property
    def ahead(self) -> int:
        """Tokens that are tokenized and not given."""
        return sum(self.documents.lengths[self.at :]) - self.offset


class Reading:
    """Documents that were read ahead in some streams of one source, to be tokenized in one call, because each
    call has its price."""

    def __init__(self, streams: Sequence[Stream], tokens: Sequence[int]) -> None:
        """Read about so many tokens more of each stream."""
        read = [stream.read(wanted) for stream, wanted in zip(streams, tokens, strict=True)]
        self._parts = [(stream, items) for stream, items in zip(streams, read, strict=True) if items]
        self._characters = 0
        self._finish: Finish | None = None

    def __len__(self) -> int:
        """The documents, those without text too."""
        return sum(len(items) for _, items in self._parts)

    def tokenize(self, tokenizer: PartsEncoder) -> Reading:
        """The tokenizer's work, in whatever thread: no stream is touched."""
        items = [item for _, part in self._parts for item in part if isinstance(item[-1], str)]
        if items:
            texts = cast("list[str]", [item[-1] for item in items])
            self._characters = sum(map(len, texts))
            self._finish = tokenizer.begin(texts, [not i[-3] for i in items], [i[-2] for i in items])
        return self

    def append(self) -> None:
        """Hand the tokens to the streams."""
        if not self._parts:
            return
        items = [item for _, part in self._parts for item in part]
        reader = self._parts[0][0].reader
        if reader.source.holds_ids:
            ids, lengths = _with_ends(reader, items)
        else:
            ids, stops = self._finish() if self._finish else (NO_TOKENS, NO_STOPS)
            lengths = np.diff(stops, prepend=0).tolist()
            if len(lengths) < len(items):
                each = iter(lengths)
                lengths = [next(each) if isinstance(item[-1], str) else 0 for item in items]
            if len(ids):
                reader.bytes_per_token = self._characters / len(ids)
        at = first = 0
        for stream, part in self._parts:
            found = lengths[at : at + len(part)]
            end = first + sum(found)
            stream.append(part, ids[first:end], found)
            at, first = at + len(part), end


def _with_ends(reader: SourceReader, items: list[Item]) -> tuple[np.ndarray, list[int]]:
    """The tokens of documents that are token ids, and how many each has: none where it is bad."""
    vocabulary = reader.source.access.vocabulary
    assert vocabulary is not None
    made = [
        with_ends(item[-1], not item[-3], item[-2], vocabulary)
        if isinstance(item[-1], np.ndarray)
        else NO_TOKENS
        for item in items
    ]
    return np.concatenate(made), [len(ids) for ids in made]
