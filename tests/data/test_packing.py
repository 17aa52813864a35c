from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from flame.data.packing import Piece, pack


@st.composite
def windows(draw: st.DrawFn) -> tuple[list[Piece], int, int]:
    """Pieces of at most a row that total whole rows."""
    length, rows = draw(st.integers(1, 50)), draw(st.integers(1, 12))
    pieces: list[Piece] = []
    need = length * rows
    while need:
        taken = min(need, draw(st.integers(1, length)))
        pieces.append(Piece(len(pieces), draw(st.integers(0, 99)), taken))
        need -= taken
    return pieces, length, rows


@given(windows())
def test_rows_are_exactly_full_and_no_token_is_lost(window: tuple[list[Piece], int, int]) -> None:
    pieces, length, rows = window
    packed = pack(pieces, length, rows)
    assert [sum(piece.length for piece in row) for row in packed] == [length] * rows
    for whole in pieces:
        parts = sorted(p for row in packed for p in row if p.document == whole.document)
        assert parts[0].offset == whole.offset
        for part, following in itertools.pairwise(parts):
            assert part.offset + part.length == following.offset
        assert parts[-1].offset + parts[-1].length == whole.offset + whole.length


def test_what_fits_is_not_cut() -> None:
    pieces = [Piece(i, 0, n) for i, n in enumerate([3, 7, 4, 6, 5, 5])]
    assert sorted(len(row) for row in pack(pieces, 10, 3)) == [2, 2, 2]
