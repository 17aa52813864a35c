"""Packing: pieces of documents laid out in rows, so that every row is exactly full, or that none is cut."""

from __future__ import annotations

from bisect import bisect_left, insort

import numpy as np

# Where pieces lie: int64 [placed, 4], in the order in which they were placed. Columns:
PIECE, ROW, START, LENGTH = range(4)  # START: in the piece, above 0 where it was cut


def pack(lengths: np.ndarray, row_length: int, rows: int, padding: int = 0) -> np.ndarray:
    """`rows` rows of exactly `row_length` tokens from pieces (`lengths`: int64 [pieces]) that total
    rows * row_length, but for the last row, which has room for `padding` tokens less: int64 [placed, 4].

    Best fit decreasing: the longest piece first, into the fullest row that still holds it. What fits
    nowhere is cut to fill the emptiest row, and the rest goes on as a piece of its own.
    """
    order = _longest_first(lengths)
    rooms = [row_length * rows + row for row in range(rows)]  # sorted: tokens free * rows + row
    if padding:
        rooms.insert(0, rooms.pop() - padding * rows)
    placed: list[int] = []  # flat: a tuple for each would cost more than its place
    for piece, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
        start = 0
        place = bisect_left(rooms, length * rows)
        while place == len(rooms):
            room, row = divmod(rooms.pop(), rows)
            placed += (piece, row, start, room)
            start, length = start + room, length - room
            place = bisect_left(rooms, length * rows)
        room = rooms.pop(place)
        placed += (piece, room % rows, start, length)
        if (left := room - length * rows) >= rows:
            insort(rooms, left)
    return np.array(placed, dtype=np.int64).reshape(-1, 4)


def pack_whole(lengths: np.ndarray, row_length: int, rows: int) -> tuple[np.ndarray, int]:
    """The first pieces, uncut, in `rows` rows of at most `row_length` tokens, and how many they are: with the
    next one, no row would have room for it. A piece is at most a row.

    Best fit decreasing lays out as many of the first as it can; pieces that still fit behind it follow.
    """
    for count in range(len(lengths), -1, -1):
        order = _longest_first(lengths[:count])
        laid = _best_fit(lengths[order].tolist(), row_length, rows)
        if laid is None:
            continue
        row_of, rooms = laid
        for length in lengths[count:].tolist():
            row = _place(length, rooms, rows)
            if row is None:
                break
            row_of.append(row)
        count = len(row_of)
        order = np.append(order, np.arange(len(order), count))
        return np.stack([order, np.array(row_of, np.int64), np.zeros_like(order), lengths[order]], 1), count
    raise AssertionError("no piece at all always fits")


def _longest_first(lengths: np.ndarray) -> np.ndarray:
    """The pieces by falling length; of equal ones the first comes first."""
    return np.argsort(-lengths, kind="stable")


def _best_fit(lengths: list[int], row_length: int, rows: int) -> tuple[list[int], list[int]] | None:
    """The row of each, and what room is left as in `pack`; None where some piece fits nowhere."""
    rooms = [row_length * rows + row for row in range(rows)]
    row_of: list[int] = []
    for length in lengths:
        row = _place(length, rooms, rows)
        if row is None:
            return None
        row_of.append(row)
    return row_of, rooms


def _place(length: int, rooms: list[int], rows: int) -> int | None:
    """Take room in the fullest row that has enough, if there is one."""
    place = bisect_left(rooms, length * rows)
    if place == len(rooms):
        return None
    room = rooms.pop(place)
    insort(rooms, room - length * rows)
    return room % rows
