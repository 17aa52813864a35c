from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from flame.data.blocks import (
    even_ranges,
    feistel,
    mix,
    mix_each,
    philox_block,
    positions_of_lane,
    shuffled,
    shuffled_by,
)


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_feistel_is_a_permutation(count: int, key: int) -> None:
    image = feistel(np.arange(count), count, key)
    assert sorted(image.tolist()) == list(range(count))


def test_feistel_gives_single_positions_as_it_gives_all() -> None:
    whole = feistel(np.arange(1000), 1000, 5)
    assert [int(feistel(np.array([i]), 1000, 5)[0]) for i in range(0, 1000, 37)] == whole[::37].tolist()


def test_every_epoch_is_another_order_without_pattern() -> None:
    epochs = [feistel(np.arange(500), 500, mix(7, epoch, 3)) for epoch in range(20)]
    for i, first in enumerate(epochs):
        assert abs(np.corrcoef(first, np.arange(500))[0, 1]) < 0.2
        for second in epochs[:i]:
            assert (first == second).sum() < 15


def test_orders_are_fixed_for_ever() -> None:
    """Streams of runs that live: these values may change only with the format version."""
    assert feistel(np.arange(10), 10, 123).tolist() == [6, 4, 8, 0, 7, 2, 1, 9, 3, 5]
    assert shuffled(8, 1, 2).tolist() == [4, 2, 0, 6, 1, 5, 7, 3]
    assert mix(1, 2, 3) == 16923298687364769832


@given(st.integers(0, 300), st.integers(1, 20))
def test_lanes_share_all_positions(count: int, lanes: int) -> None:
    assert sum(positions_of_lane(count, lane, lanes) for lane in range(lanes)) == count


@given(st.integers(0, 1000), st.integers(0, 1000), st.integers(1, 50))
def test_even_ranges_tile(start: int, length: int, pieces: int) -> None:
    starts, stops = even_ranges(start, start + length, pieces)
    covered = [n for a, b in zip(starts, stops, strict=True) for n in range(a, b)]
    assert covered == list(range(start, start + length))


def test_shuffled_is_a_permutation_of_any_size() -> None:
    assert [sorted(shuffled(n, 3, 4).tolist()) for n in range(6)] == [list(range(n)) for n in range(6)]


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_small_orders_are_those_of_numpys_philox(first: int, second: int) -> None:
    theirs = np.random.Philox(key=np.array([first, second], dtype=np.uint64)).random_raw(4)
    assert list(philox_block(first, second)) == theirs.tolist()
    for count in range(6):
        expected = shuffled(count, first, second).tolist()
        assert shuffled_by(philox_block(first, second), count, first, second) == expected


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=5), st.integers(0, 2**64 - 1))
def test_many_keys_at_once_give_what_each_gives(keys: list[int], second: int) -> None:
    words = np.array(keys, dtype=np.uint64)
    assert mix_each(second, words, 5).tolist() == [mix(second, key, 5) for key in keys]
    draws = [word.tolist() for word in philox_block(words, second)]
    assert list(zip(*draws, strict=True)) == [philox_block(key, second) for key in keys]
