from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from flame.data.packing import LENGTH, PIECE, ROW, START, pack


@st.composite
def windows(draw: st.DrawFn) -> tuple[list[int], int, int]:
    """Pieces of at most a row that total whole rows."""
    length, rows = draw(st.integers(1, 50)), draw(st.integers(1, 12))
    pieces: list[int] = []
    while need := length * rows - sum(pieces):
        pieces.append(min(need, draw(st.integers(1, length))))
    return pieces, length, rows


def packed_rows(pieces: list[int], length: int, rows: int) -> list[list[tuple[int, int, int]]]:
    """The (piece, start, length) of each row, in the order in which they were placed."""
    placed = pack(np.array(pieces, dtype=np.int64), length, rows)
    found: list[list[tuple[int, int, int]]] = [[] for _ in range(rows)]
    for where in placed.tolist():
        found[where[ROW]].append((where[PIECE], where[START], where[LENGTH]))
    return found


@given(windows())
def test_rows_are_exactly_full_and_no_token_is_lost(window: tuple[list[int], int, int]) -> None:
    pieces, length, rows = window
    packed = packed_rows(pieces, length, rows)
    assert [sum(tokens for _, _, tokens in row) for row in packed] == [length] * rows
    for number, whole in enumerate(pieces):
        parts = sorted(part for row in packed for part in row if part[0] == number)
        assert parts[0][1] == 0
        for (_, start, tokens), (_, following, _) in itertools.pairwise(parts):
            assert start + tokens == following
        assert parts[-1][1] + parts[-1][2] == whole


@given(windows())
def test_best_fit_decreasing_to_the_letter(window: tuple[list[int], int, int]) -> None:
    """The order of all rows rests on it: the longest piece, of equals the first, into the fullest row that
    holds it, of equals the first; what fits nowhere fills the emptiest row, of equals the last."""
    pieces, length, rows = window
    room = [length] * rows
    expected: list[list[tuple[int, int, int]]] = [[] for _ in range(rows)]
    for number, tokens in sorted(enumerate(pieces), key=lambda piece: -piece[1]):
        start = 0
        while tokens:
            open_rows = [(free, row) for row, free in enumerate(room) if free >= tokens]
            free, row = min(open_rows) if open_rows else max((free, row) for row, free in enumerate(room))
            part = min(free, tokens)
            expected[row].append((number, start, part))
            room[row], start, tokens = free - part, start + part, tokens - part
    assert packed_rows(pieces, length, rows) == expected


def test_what_fits_is_not_cut() -> None:
    assert sorted(len(row) for row in packed_rows([3, 7, 4, 6, 5, 5], 10, 3)) == [2, 2, 2]
