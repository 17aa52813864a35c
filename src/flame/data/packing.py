"""Packing: pieces of documents laid out in rows, so that every row is exactly full, or that none is cut."""

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


def pack_whole(pieces: list[Piece], row_length: int, rows: int) -> tuple[list[list[Piece]], int]:
    """The first pieces, uncut, in `rows` rows of at most `row_length` tokens, and how many they are: with the
    next one, no row would have room for it. A piece is at most a row.

    Best fit decreasing lays out as many of the first as it can; pieces that still fit behind it follow.
    """
    for count in range(len(pieces), -1, -1):
        laid = _best_fit_decreasing(pieces[:count], row_length, rows)
        if laid is not None:
            packed, rooms = laid
            while count < len(pieces) and _place(pieces[count], packed, rooms, rows):
                count += 1
            return packed, count
    raise AssertionError("no piece at all always fits")


def _best_fit_decreasing(
    pieces: list[Piece], row_length: int, rows: int
) -> tuple[list[list[Piece]], list[int]] | None:
    """The rows, and what room is left in them as in `pack`; None where some piece fits nowhere."""
    packed: list[list[Piece]] = [[] for _ in range(rows)]
    rooms = [row_length * rows + row for row in range(rows)]
    for piece in sorted(pieces, key=itemgetter(2), reverse=True):
        if not _place(piece, packed, rooms, rows):
            return None
    return packed, rooms


def _place(piece: Piece, packed: list[list[Piece]], rooms: list[int], rows: int) -> bool:
    """Into the fullest row that has room for all of it, if there is one."""
    place = bisect_left(rooms, piece.length * rows)
    if place == len(rooms):
        return False
    room = rooms.pop(place)
    packed[room % rows].append(piece)
    insort(rooms, room - piece.length * rows)
    return True
