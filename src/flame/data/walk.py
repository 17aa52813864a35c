"""The order of a stream: the records of one source in one lane, epoch after epoch, from any place on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

import numpy as np

from flame.data import blocks
from flame.data.blocks import Blocks, Draws, Range
from flame.data.formats import Bad, Content, Format, text_of
from flame.data.ids import split_ids
from flame.data.plan import DataPlan
from flame.data.raw import is_url
from flame.data.sources import Source
from flame.data.split import is_held_out
from flame.data.tokens import split_text

HELD_OUT = Bad("held out for validation")  # in the place of a document's text
EXHAUSTED = Bad("no text in as much as the whole source holds")  # behind that much
BYTES_PER_TOKEN = 4  # of text that was not seen yet
POSITIONS_AHEAD = 512  # block positions permuted at once

# A document, or one part of a long one: epoch, group, its number in the group, file, position of the record
# in its file, part (None where the text was not split), whether it ends its record, and what it holds. A
# plain tuple: it lives until its fields are in the columns of `documents.Documents`.
Item = tuple[int, int, int, int, int, int | None, bool, str | np.ndarray | Bad]


class Group(NamedTuple):
    """G blocks of a lane, whose documents are permuted together."""

    epoch: int
    number: int
    ranges: list[Range]
    key: int  # of the permutation
    draws: Draws


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
        self.bytes_per_token = float(BYTES_PER_TOKEN)  # as measured last; it only sizes what is read ahead

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


class Walk:
    """The documents of one source in one lane, from a place on, without end or to the last epoch."""

    def __init__(self, reader: SourceReader, lane: int, epoch: int, group: int, skipped: int) -> None:
        """`skipped`: documents of the first group that are passed."""
        self._reader, self._lane = reader, lane
        self._found_text = False  # in the group that is read
        self._items = self._documents(epoch, group, skipped)

    def __iter__(self) -> Iterator[Item]:
        return self._items

    def _documents(self, first_epoch: int, first_group: int, skipped: int) -> Iterator[Item]:
        """All documents from a place on. `skipped` documents of the first group are passed."""
        barren = 0  # units of groups in a row that hold no text
        for group in self._groups(first_epoch, first_group):
            self._found_text = skipped > 0
            yield from islice(self._in_group(group), skipped, None)
            skipped = 0
            if self._found_text:
                barren = 0
                continue
            held = self._reader.blocks(group.epoch)
            barren += held.units(group.ranges)
            if barren >= held.all_units and not self._reader.plan.validates:
                yield group.epoch, group.number, 0, 0, 0, None, True, EXHAUSTED

    def _groups(self, epoch: int, group: int) -> Iterator[Group]:
        """The groups from a place on."""
        plan, size = self._reader.plan, self._reader.plan.group_blocks
        while self._reader.max_epochs is None or epoch < self._reader.max_epochs:
            positions = blocks.positions_of_lane(len(self._reader.blocks(epoch)), self._lane, plan.lanes)
            for first in range(group * size, positions, POSITIONS_AHEAD // size * size):
                count = min(POSITIONS_AHEAD // size * size, positions - first)
                order = self._reader.block_order(epoch, self._lane, first, count)
                ranges = self._reader.blocks(epoch).ranges(order)
                numbers = range(first // size, (first + count - 1) // size + 1)
                for number, key, draws in zip(numbers, *self._draws(epoch, numbers), strict=True):
                    at = number * size - first
                    self._reader.expect(ranges[at + size : at + 2 * size])
                    yield Group(epoch, number, ranges[at : at + size], key, draws)
            epoch, group = epoch + 1, 0

    def _draws(self, epoch: int, groups: range) -> tuple[list[int], list[Draws]]:
        """The keys of the orders of some groups, and their first draws: for many at once, because groups
        are small where each document is a block."""
        reader = self._reader
        keys = blocks.mix_each(
            reader.plan.seed, epoch, np.arange(groups.start, groups.stop, dtype=np.uint64), self._lane
        )
        draws = blocks.philox_block(keys, reader.key)
        return keys.tolist(), list(zip(*(word.tolist() for word in draws), strict=True))

    def _in_group(self, group: Group) -> Iterator[Item]:
        """The documents of a group, permuted; the parts of a long one stay together, in order."""
        reader, epoch = self._reader, group.epoch
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
            if len(parts) == 1:
                yield epoch, group.number, number, file, position, None, True, parts[0]
                number += 1
                continue
            for part, piece in enumerate(parts):
                yield epoch, group.number, number, file, position, part, part == len(parts) - 1, piece
                number += 1
