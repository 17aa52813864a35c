"""What tells whether two runs saw the same rows."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from flame.data.hashes import digest, row_hashes

PINNED = [9708093419239676714, 3506732301964668647]
PINNED_DIGEST = -4125399511963880297
TOKENS = st.integers(-(2**31), 2**31 - 1)


@given(st.lists(TOKENS, min_size=2, max_size=40), st.data())
def test_one_changed_token_is_another_hash(row: list[int], data: st.DataObject) -> None:
    place = data.draw(st.integers(0, len(row) - 1))
    other = data.draw(TOKENS.filter(lambda token: token != row[place]))
    changed = [*row[:place], other, *row[place + 1 :]]
    first, second = row_hashes(np.array([row, changed], dtype=np.int32)).tolist()
    assert first != second


@given(st.lists(st.integers(0, 50000), min_size=2, max_size=40), st.data())
def test_two_tokens_that_change_places_are_another_hash(row: list[int], data: st.DataObject) -> None:
    i, j = (data.draw(st.integers(0, len(row) - 1)) for _ in range(2))
    swapped = list(row)
    swapped[i], swapped[j] = row[j], row[i]
    first, second = row_hashes(np.array([row, swapped], dtype=np.int32)).tolist()
    assert (first == second) == (swapped == row)


def test_hashes_are_the_same_in_any_process_and_version_of_numpy() -> None:
    """Data states hold them."""
    rows = np.arange(14, dtype=np.int32).reshape(2, 7) - 3
    assert row_hashes(rows).tolist() == PINNED
    assert digest([5, 6], PINNED) == PINNED_DIGEST


def test_digests_of_parts_add_up_and_know_which_row_it_was() -> None:
    hashes = [2**63 + 1, 7, 7]
    parts = digest([0], hashes[:1]) + digest([1, 2], hashes[1:])
    assert (parts + 2**63) % 2**64 - 2**63 == digest([2, 0, 1], [7, hashes[0], 7])
    assert digest([1, 0], hashes[:2]) != digest([0, 1], hashes[:2])
    assert digest([], []) == 0
