"""Blocks: how a source is cut, and in which order a lane reads the pieces.

A cut is a function of sizes, an order one of (seed, epoch, source, lane): nothing is shuffled in
memory, so that a cursor of four numbers is a place in the stream.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

RULE = "bytes/(16*lanes) in 4KiB..4MiB; each document below 256MiB"  # part of the fingerprint
INDEX_BELOW = 256 * 2**20  # decoded bytes of a source; below it each document is a block of its own
SMALLEST, LARGEST = 4 * 2**10, 4 * 2**20  # bytes of decoded text in a block
ROUNDS = 6  # of the Feistel network
GOLDEN, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
MASK, HALF = 2**64 - 1, 2**32 - 1

Range = tuple[int, int, int]  # file, start, stop
Draws = Sequence[int]  # four, the first of a Philox stream


@dataclass(frozen=True, slots=True)
class Blocks:
    """The blocks of a source in file order. A range is in bytes (line formats) or rows (tables)."""

    file: np.ndarray  # int32 [blocks]: index of the file
    start: np.ndarray  # int64 [blocks]
    stop: np.ndarray  # int64 [blocks], exclusive
    each_document: bool  # a block holds one document

    def __len__(self) -> int:
        return len(self.file)

    def ranges(self, blocks: np.ndarray) -> list[Range]:
        """Some of the blocks."""
        places = (self.file[blocks].tolist(), self.start[blocks].tolist(), self.stop[blocks].tolist())
        return list(zip(*places, strict=True))

    def units(self, ranges: list[Range]) -> int:
        """How much of the source these blocks are: documents, or else bytes or rows."""
        return len(ranges) if self.each_document else sum(stop - start for _, start, stop in ranges)

    @property
    def all_units(self) -> int:
        """`units` of the whole source."""
        return len(self) if self.each_document else int((self.stop - self.start).sum())


def join(ranges: list[tuple[np.ndarray, np.ndarray]], each_document: bool) -> Blocks:
    """The blocks of a source from the (starts, stops) of each of its files."""
    counts = [len(starts) for starts, _ in ranges]
    return Blocks(
        np.repeat(np.arange(len(ranges), dtype=np.int32), counts),
        np.concatenate([starts for starts, _ in ranges]).astype(np.int64),
        np.concatenate([stops for _, stops in ranges]).astype(np.int64),
        each_document,
    )


def block_bytes(source_bytes: int, lanes: int) -> int:
    """The decoded size that a block of a large source aims at."""
    return min(LARGEST, max(SMALLEST, source_bytes // (16 * lanes)))


def even_ranges(start: int, stop: int, pieces: int) -> tuple[np.ndarray, np.ndarray]:
    """[start, stop) in `pieces` ranges of nearly equal length: (starts, stops). None of an empty one."""
    if stop == start:
        return np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
    bounds = start + np.arange(pieces + 1, dtype=np.int64) * (stop - start) // pieces
    return bounds[:-1], bounds[1:]


# -------------------------------------------------------------------------------------- orders


def mix(*words: int) -> int:
    """64 well-mixed bits of any whole numbers (the finisher of splitmix64, chained)."""
    return _mix(words)


def mix_each(*words: int | np.ndarray) -> np.ndarray:
    """`mix` where words are arrays (uint64): uint64, of their length."""
    return _mix(words)


def _mix(words: Sequence[Any]) -> Any:
    h: Any = GOLDEN
    for word in words:
        h = (h ^ word) & MASK
        h = ((h ^ (h >> 30)) * FIRST) & MASK
        h = ((h ^ (h >> 27)) * SECOND) & MASK
        h = h ^ (h >> 31)
    return h


def name_key(name: str) -> int:
    """64 bits of a source's name."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def feistel(positions: np.ndarray, count: int, key: int) -> np.ndarray:
    """The images of `positions` under the permutation of range(count) that `key` names: int64.

    A Feistel network on the next power of four, walked until it lands inside.
    """
    half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    keys = [np.uint64(mix(key, r)) for r in range(ROUNDS)]
    image = positions.astype(np.uint64)
    outside = np.ones(len(image), dtype=bool)
    while outside.any():
        left, right = image[outside] >> half, image[outside] & mask
        for round_key in keys:
            left, right = right, left ^ (_scramble(right ^ round_key) & mask)
        image[outside] = (left << half) | right
        outside = image >= np.uint64(count)
    return image.astype(np.int64)


def _scramble(words: np.ndarray) -> np.ndarray:
    h = (words ^ (words >> np.uint64(30))) * np.uint64(FIRST)
    h = (h ^ (h >> np.uint64(27))) * np.uint64(SECOND)
    return h ^ (h >> np.uint64(31))


def shuffled(count: int, first_key: int, second_key: int) -> np.ndarray:
    """A permutation of range(count), the same with every version of numpy: int64.

    `random_raw` is the stream of Philox itself; what Generator.permutation makes of it is not promised.
    """
    if count < 2:
        return np.zeros(count, dtype=np.int64)
    draws = np.random.Philox(key=np.array([first_key, second_key], dtype=np.uint64)).random_raw(count)
    return np.argsort(draws, kind="stable")


def shuffled_by(draws: Draws, count: int, first_key: int, second_key: int) -> list[int]:
    """`shuffled` as a list, by the first draws where they are enough: numpy's Philox is slow to make."""
    if count > len(draws):
        return shuffled(count, first_key, second_key).tolist()
    return sorted(range(count), key=draws.__getitem__)


def philox_block(first_key: Any, second_key: int) -> tuple[Any, Any, Any, Any]:
    """The first four draws of numpy's Philox4x64-10 (Salmon et al., 2011): its block at counter 1.

    Of one key, whole numbers; of an array of first keys (uint64), arrays of their length.
    """
    a, b, c, d = cast("tuple[Any, Any, Any, Any]", (1, 0, 0, 0))
    for _ in range(10):
        (a_high, a_low), (c_high, c_low) = _product(a, 0xD2E7470EE14C6C93), _product(c, 0xCA5A826395121157)
        a, b, c, d = c_high ^ b ^ first_key, c_low, a_high ^ d ^ second_key, a_low
        first_key = (first_key + 0x9E3779B97F4A7C15) & MASK
        second_key = (second_key + 0xBB67AE8584CAA73B) & MASK
    return a, b, c, d


def _product(word: Any, factor: int) -> tuple[Any, Any]:
    """The high and low 64 bits of a product; numpy has the low ones only."""
    if isinstance(word, int):
        return word * factor >> 64, word * factor & MASK
    high, low, half = word >> 32, word & HALF, factor & HALF
    cross = high * half
    middle = (low * half >> 32) + (cross & HALF) + low * (factor >> 32)
    return high * (factor >> 32) + (cross >> 32) + (middle >> 32), word * factor


def positions_of_lane(blocks: int, lane: int, lanes: int) -> int:
    """How many of the permuted blocks a lane reads in an epoch."""
    return max(0, -(-(blocks - lane) // lanes))
