"""A stream: the documents of one source in one lane, epoch after epoch, in order, from any cursor on."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import attrgetter
from typing import NamedTuple, cast

import numpy as np

from flame.batch import COUNTED, Skip
from flame.data import blocks
from flame.data.blocks import Blocks, Draws, Range
from flame.data.formats import Bad, Content, Format, text_of
from flame.data.ids import BYTES_PER_ID, split_ids, with_ends
from flame.data.plan import DataPlan
from flame.data.raw import is_url
from flame.data.sources import Source, document_id
from flame.data.split import is_held_out
from flame.data.tokens import PartsEncoder, split_text
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
HELD_OUT = Bad("held out for validation")  # in the place of a document's text
POSITIONS_AHEAD = 512  # block positions permuted at once
BATCH_BYTES = 8 * 2**20  # most text tokenized in one call
BYTES_PER_TOKEN = 4  # a guess that only sizes the calls
NO_TOKENS = np.zeros(0, dtype=np.int32)

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


@dataclass(slots=True)
class Document:
    """One document, or one part of a long one, in the order of its stream."""

    epoch: int
    group: int
    number: int  # in the group
    position: int  # of the record in its file
    file: int
    part: int | None  # where the text was split
    ends_record: bool
    text: str | np.ndarray | Bad  # or its token ids
    tokens: np.ndarray  # int32 [tokens]


class Group(NamedTuple):
    """G blocks of a lane, whose documents are permuted together."""

    epoch: int
    number: int
    ranges: list[Range]
    key: int  # of the permutation
    draws: Draws


class Mark(NamedTuple):
    """A place in a stream to go back to."""

    cursor: Cursor
    passed: int
    skips: int


class Exhausted:
    """In the place of a document: as much as the whole source holds was read and none of it is text."""


class SourceReader:
    """What all lanes of a rank share of a source: its open files and its keys."""

    def __init__(
        self,
        source: Source,
        plan: DataPlan,
        max_epochs: int | None = None,
        generations: Sequence[tuple[int, Blocks]] = (),
    ) -> None:
        """`generations`: (first epoch, blocks), where files joined the source while it was read."""
        self.source, self.plan, self.max_epochs = source, plan, max_epochs
        self._generations = generations or [(0, source.blocks)]
        self.format: Format = source.open()
        self._remote = any(is_url(file.path) for file in source.files)
        self.key = blocks.name_key(source.name)

    def blocks(self, epoch: int) -> Blocks:
        """The blocks that the source has in an epoch."""
        return next(cut for first, cut in reversed(self._generations) if first <= epoch)

    def block_order(self, epoch: int, lane: int, first: int, count: int) -> np.ndarray:
        """The blocks at positions [first, first + count) of a lane in an epoch: int64."""
        positions = lane + np.arange(first, first + count, dtype=np.int64) * self.plan.lanes
        if self.plan.validates:
            return positions
        key = blocks.mix(self.plan.seed, epoch, self.key)
        return blocks.feistel(positions, len(self.blocks(epoch)), key)

    def records(self, group: list[Range]) -> list[tuple[int, int, Content]]:
        """The records of some blocks in file order: (file, position, content)."""
        read = self.format.read
        return [
            (file, position, content)
            for file, start, stop in group
            for position, content in read(file, start, stop)
        ]

    def expect(self, group: list[Range]) -> None:
        """Some blocks will be read soon."""
        if self._remote:
            for file, start, stop in group:
                self.format.expect(file, start, stop)

    def skip_of(self, document: Document, reason: str) -> Skip:
        """The name of a record that is not trained."""
        file = self.source.files[document.file]
        place = self.format.place(document.file, document.position)
        return Skip(
            self.source.name, document.epoch, self.document_id(document), str(file.path), place, reason
        )

    def document_id(self, document: Document) -> str:
        return document_id(self.source.files[document.file].name, document.position, document.part)


class Stream:
    """Documents of one source in one lane. `document` looks, `give` moves; both are exact whatever was
    read and tokenized ahead."""

    def __init__(self, reader: SourceReader, tokenizer: PartsEncoder, lane: int, cursor: Cursor) -> None:
        self.reader, self.lane, self.cursor = reader, lane, cursor
        self.skips: list[Skip] = []  # since somebody last took them
        self._tokenizer = tokenizer
        self._ahead: deque[Document | Exhausted] = deque()
        self._found_text = False  # in the group that is read
        self._walk = self._documents(cursor.epoch, cursor.group, cursor.document)
        self.longest: int | None = None  # tokens of a document; a longer one is overlong
        self._given_epoch = cursor.epoch  # in which tokens were last given
        self._passed: deque[Document] = deque()  # since `forget`

    @property
    def ended(self) -> bool:
        """Whether the source has given all that it has for this lane."""
        return self.reader.max_epochs is not None and self.cursor.epoch >= self.reader.max_epochs

    def document(self, expected_tokens: int) -> Document | None:
        """The document at the cursor, tokenized; records without text are passed over on the way.

        None where `max_epochs` are over. `expected_tokens`: about as many will be asked for soon; it only
        sizes what is tokenized at once. Raises DataError where nothing of the source is text.
        """
        while True:
            if not self._ahead:
                self._tokenize(expected_tokens)
            at = self.cursor
            if not self._ahead:
                assert self.reader.max_epochs is not None
                at.epoch, at.group, at.document = self.reader.max_epochs, 0, 0
                return None
            head = self._ahead[0]
            if isinstance(head, Exhausted):
                raise DataError(
                    f'source "{self.reader.source.name}": lane {self.lane} read as many records as the '
                    f"source holds and found {self._why_none()}"
                )
            at.epoch, at.group, at.document = head.epoch, head.group, head.number
            at.begun = at.epoch
            if len(head.tokens):
                if self._takes(head):
                    return head
                self._pass(head)
                continue
            if head.text is HELD_OUT:
                at.held_out += 1
            elif isinstance(head.text, Bad):
                at.skipped += 1
                self.skips.append(self.reader.skip_of(head, head.text.reason))
            self._pass(head)

    def give(self, tokens: int) -> None:
        """Move on by `tokens` of the document at the cursor."""
        head, at = self._ahead[0], self.cursor
        assert isinstance(head, Document)
        if not at.offset and self._is_overlong(head):
            at.overlong += not head.part
        self._given_epoch = at.epoch
        at.offset += tokens
        at.tokens += tokens
        at.phase_tokens += tokens
        if at.offset == len(head.tokens):
            self._pass(head)

    # ------------------------------------------------------------------------ back and forth

    def forget(self) -> None:
        """No mark made before this is gone back to."""
        self._passed.clear()

    def mark(self) -> Mark:
        """This place, to go back to."""
        return Mark(Cursor(*self.cursor.values()), len(self._passed), len(self.skips))

    def back_to(self, mark: Mark) -> None:
        """Take back all that was given and passed since a mark."""
        self.cursor = mark.cursor
        while len(self._passed) > mark.passed:
            self._ahead.appendleft(self._passed.pop())
        del self.skips[mark.skips :]

    # ------------------------------------------------------------------------------ long ones

    def _is_overlong(self, head: Document) -> bool:
        return self.longest is not None and len(head.tokens) > self.longest

    def _takes(self, head: Document) -> bool:
        """Whether a document is trained. One that is too long to be is counted and named."""
        what, at = self.reader.plan.overlong, self.cursor
        if what == "cut" or at.offset or not (head.part is not None or self._is_overlong(head)):
            return True
        found = "more than 1 MiB" if head.part is not None else f"{len(head.tokens)} tokens"
        reason = f"{found}, longer than max_document_length = {self.longest}"
        skip = self.reader.skip_of(head, reason)
        if what == "error":
            raise DataError(
                f'source "{skip.source}": {skip.file}, {skip.place}: {reason}; raise that, or set overlong '
                'to "cut" or "skip"'
            )
        if at.epoch - self._given_epoch > self.reader.plan.lanes:
            raise DataError(
                f'source "{skip.source}": lane {self.lane} read as many records as the source holds, and all '
                f"are too long; the last: {skip.file}, {skip.place}: {reason}"
            )
        if not head.part:
            at.overlong += 1
            self.skips.append(skip)
        return False

    def _pass(self, head: Document) -> None:
        self._ahead.popleft()
        self._passed.append(head)
        self.cursor.records += head.ends_record
        self.cursor.document = head.number + 1
        self.cursor.offset = self.cursor.cut = 0

    def _why_none(self) -> str:
        if self.cursor.held_out:
            return "none to train on; all are held out: lower validation.fraction"
        if not self.skips:
            return "no text in any of them"
        last = self.skips[-1]
        return f"no text in any of them; the last: {last.file}, {last.place}: {last.reason}"

    def _tokenize(self, expected_tokens: int) -> None:
        """Append the next documents, at least one unless there is none: about as many tokens as are
        expected."""
        wanted = min(BATCH_BYTES, expected_tokens * BYTES_PER_TOKEN)
        taken: list[Document] = []
        length = 0
        for document in self._walk:
            self._ahead.append(document)
            if isinstance(document, Exhausted):
                break
            if isinstance(document.text, str):
                taken.append(document)
                length += len(document.text)
            elif isinstance(document.text, np.ndarray):
                length += BYTES_PER_ID * len(document.text)
                vocabulary = self.reader.source.access.vocabulary
                assert vocabulary is not None
                document.tokens = with_ends(
                    document.text, not document.part, document.ends_record, vocabulary
                )
                document.text = ""
            if length >= wanted:
                break
        parts = [(cast("str", d.text), not d.part, d.ends_record) for d in taken]
        for document, tokens in zip(taken, self._tokenizer.encode_parts(parts), strict=True):
            document.tokens, document.text = tokens, ""

    # ------------------------------------------------------------------------------ the order

    def _documents(self, first_epoch: int, first_group: int, skipped: int) -> Iterator[Document | Exhausted]:
        """All documents from a place on. `skipped` documents of the first group are passed."""
        barren = 0  # units of groups in a row that hold no text
        for group in self._groups(first_epoch, first_group):
            self._found_text = skipped > 0
            yield from islice(self._in_group(group), skipped, None)
            skipped = 0
            if self._found_text:
                barren = 0
                continue
            held = self.reader.blocks(group.epoch)
            barren += held.units(group.ranges)
            if barren >= held.all_units and not self.reader.plan.validates:
                yield Exhausted()

    def _groups(self, epoch: int, group: int) -> Iterator[Group]:
        """The groups from a place on."""
        plan, size = self.reader.plan, self.reader.plan.group_blocks
        while self.reader.max_epochs is None or epoch < self.reader.max_epochs:
            positions = blocks.positions_of_lane(len(self.reader.blocks(epoch)), self.lane, plan.lanes)
            for first in range(group * size, positions, POSITIONS_AHEAD // size * size):
                count = min(POSITIONS_AHEAD // size * size, positions - first)
                order = self.reader.block_order(epoch, self.lane, first, count)
                ranges = self.reader.blocks(epoch).ranges(order)
                numbers = range(first // size, (first + count - 1) // size + 1)
                for number, key, draws in zip(numbers, *self._draws(epoch, numbers), strict=True):
                    at = number * size - first
                    self.reader.expect(ranges[at + size : at + 2 * size])
                    yield Group(epoch, number, ranges[at : at + size], key, draws)
            epoch, group = epoch + 1, 0

    def _draws(self, epoch: int, groups: range) -> tuple[list[int], list[Draws]]:
        """The keys of the orders of some groups, and their first draws: for many at once, because groups
        are small where each document is a block."""
        reader = self.reader
        keys = blocks.mix_each(
            reader.plan.seed, epoch, np.arange(groups.start, groups.stop, dtype=np.uint64), self.lane
        )
        draws = blocks.philox_block(keys, reader.key)
        return keys.tolist(), list(zip(*(word.tolist() for word in draws), strict=True))

    def _in_group(self, group: Group) -> Iterator[Document]:
        """The documents of a group, permuted; the parts of a long one stay together, in order."""
        reader, epoch = self.reader, group.epoch
        records = reader.records(group.ranges)
        fraction, validates = reader.plan.validation_fraction, reader.plan.validates
        number = 0
        order = blocks.shuffled_by(group.draws, len(records), group.key, reader.key)
        for i in range(len(records)) if validates else order:
            file, position, content = records[i]
            text = text_of(reader.format, content)
            if fraction and not isinstance(text, Bad):
                apart = is_held_out(text, fraction)
                if validates and not apart:
                    continue  # nearly all documents: they are not even counted
                if apart and not validates:
                    text = HELD_OUT
            parts: Sequence[str | np.ndarray | Bad] = (text,)
            if not isinstance(text, Bad):
                self._found_text = True
                parts = split_ids(text) if isinstance(text, np.ndarray) else split_text(text)
            last = len(parts) - 1
            for part, piece in enumerate(parts):
                name = part if last else None
                yield Document(
                    epoch, group.number, number, position, file, name, part == last, piece, NO_TOKENS
                )
                number += 1
