"""Packing: pieces of documents that total whole rows, laid out so that every row is exactly full."""

from __future__ import annotations

from bisect import bisect_left, insort
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
    rooms = [row_length * rows + row for row in range(rows)]  # sorted: tokens free * rows + row
    if padding:
        rooms.insert(0, rooms.pop() - padding * rows)
    for piece in sorted(pieces, key=itemgetter(2), reverse=True):
        place = bisect_left(rooms, piece.length * rows)
        while place == len(rooms):
            room, row = divmod(rooms.pop(), rows)
            packed[row].append(piece._replace(length=room))
            piece = Piece(piece.document, piece.offset + room, piece.length - room)
            place = bisect_left(rooms, piece.length * rows)
        room = rooms.pop(place)
        packed[room % rows].append(piece)
        if (left := room - piece.length * rows) >= rows:
            insort(rooms, left)
    return packed
