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
POSITIONS = 512  # of a lane, ordered at once, for all lanes: groups are small where each document is a block
KEPT_ORDERS = 4  # lanes are not at the same place

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


class Order(NamedTuple):
    """The order of some positions of a lane."""

    blocks: np.ndarray  # int64 [positions]
    keys: np.ndarray  # uint64 [groups]: of the permutations of the groups that they are in
    draws: np.ndarray  # uint64 [groups, 4]: the first of each


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
        self.lanes: list[int] = []  # that walk it
        self._orders: dict[tuple[int, int], dict[int, Order]] = {}
        self.bytes_per_token = float(BYTES_PER_TOKEN)  # as measured last; it only sizes what is read ahead

    def blocks(self, epoch: int) -> Blocks:
        """The blocks that the source has in an epoch."""
        return next(cut for first, cut in reversed(self._generations) if first <= epoch)

    def order(self, epoch: int, lane: int, chunk: int) -> Order:
        """The order of a lane's positions [chunk * POSITIONS, (chunk + 1) * POSITIONS) in an epoch."""
        found = self._orders.get((epoch, chunk))
        if found is None or lane not in found:
            found = self._orders[epoch, chunk] = self._order(epoch, chunk)
            while len(self._orders) > KEPT_ORDERS:
                del self._orders[next(iter(self._orders))]
        return found[lane]

    def _order(self, epoch: int, chunk: int) -> dict[int, Order]:
        """That of all lanes, at once: each is short."""
        plan, count = self.plan, len(self.blocks(epoch))
        first, size = chunk * POSITIONS, plan.group_blocks
        held = [blocks.positions_of_lane(count, lane, plan.lanes) for lane in self.lanes]
        lanes = np.array(self.lanes, dtype=np.int64)[:, None]
        stop = min(first + POSITIONS, max(held))
        order = lanes + np.arange(first, stop, dtype=np.int64) * plan.lanes
        if not plan.validates:
            key = blocks.mix(plan.seed, epoch, self.key)
            inside = np.minimum(order, count - 1)  # not all lanes hold the last position
            order = blocks.feistel(inside.reshape(-1), count, key).reshape(order.shape)
        numbers = np.arange(first // size, -(-stop // size), dtype=np.uint64)
        keys = blocks.mix_each(plan.seed, epoch, numbers, lanes.astype(np.uint64))
        draws = np.stack(blocks.philox_block(keys, self.key), axis=-1)
        return {
            lane: Order(order[i, : held[i] - first], keys[i], draws[i]) for i, lane in enumerate(self.lanes)
        }

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
        reader.lanes.append(lane)
        self._found_text = False  # in the group that is read
        self._items = self._documents(epoch, group, skipped)

    def __iter__(self) -> Iterator[Item]:
        return self._items

    def _documents(self, first_epoch: int, first_group: int, skipped: int) -> Iterator[Item]:
        """All documents from a place on. `skipped` documents of the first group are passed."""
        barren = 0  # units of groups in a row that hold no text
        for group in self._groups(first_epoch, first_group):
            self._found_text = skipped > 0
            documents = self._in_group(group)
            yield from islice(documents, skipped, None) if skipped else documents
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
        reader, size = self._reader, self._reader.plan.group_blocks
        while reader.max_epochs is None or epoch < reader.max_epochs:
            held = reader.blocks(epoch)
            positions = blocks.positions_of_lane(len(held), self._lane, reader.plan.lanes)
            while group * size < positions:
                chunk, first = divmod(group * size, POSITIONS)
                order = reader.order(epoch, self._lane, chunk)
                ranges = held.ranges(order.blocks)
                keys, draws_of = order.keys[first // size :].tolist(), order.draws[first // size :].tolist()
                for at, key, draws in zip(range(first, len(ranges), size), keys, draws_of, strict=False):
                    reader.expect(ranges[at + size : at + 2 * size])
                    yield Group(epoch, group, ranges[at : at + size], key, draws)
                    group += 1
            epoch, group = epoch + 1, 0

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
            if isinstance(text, str):
                self._found_text = True
                parts = split_text(text)
            elif isinstance(text, np.ndarray):
                self._found_text = True
                parts = split_ids(text)
            if len(parts) == 1:
                yield epoch, group.number, number, file, position, None, True, parts[0]
                number += 1
                continue
            for part, piece in enumerate(parts):
                yield epoch, group.number, number, file, position, part, part == len(parts) - 1, piece
                number += 1
