"""Packing: pieces of documents that total whole rows, laid out so that every row is exactly full."""

from __future__ import annotations

import bisect
from operator import itemgetter
from typing import NamedTuple


class Piece(NamedTuple):
    """Tokens [offset, offset + length) of a document."""

    document: int  # the caller's number for it
    offset: int
    length: int


def pack(pieces: list[Piece], row_length: int, rows: int, padding: int = 0) -> list[list[Piece]]:
    """`rows` rows of exactly `row_length` tokens from pieces that total rows * row_length, but for the
    last row, which has room for `padding` tokens less.

    Best fit decreasing: the longest piece first, into the fullest row that still holds it. What fits
    nowhere is cut to fill the emptiest row, and the rest goes on as a piece of its own.
    """
    packed: list[list[Piece]] = [[] for _ in range(rows)]
    rooms = [(row_length, row) for row in range(rows)]  # sorted: (tokens free, row)
    if padding:
        rooms.insert(0, (row_length - padding, rooms.pop()[1]))
    for document, offset, length in sorted(pieces, key=itemgetter(2), reverse=True):
        while length:
            place = bisect.bisect_left(rooms, (length, -1))
            room, row = rooms.pop(min(place, len(rooms) - 1))
            taken = min(length, room)
            packed[row].append(Piece(document, offset, taken))
            offset, length = offset + taken, length - taken
            if room > taken:
                bisect.insort(rooms, (room - taken, row))
    return packed
