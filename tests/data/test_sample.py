from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flame.data.sample import sample_texts, spread


@given(st.integers(0, 3000))
def test_an_order_holds_everything_once(count: int) -> None:
    assert sorted(spread(count)) == list(range(count))


@given(st.integers(100, 10**6), st.integers(10, 100))
def test_every_beginning_of_the_order_is_spread_over_the_whole(count: int, taken: int) -> None:
    gaps = np.diff(np.sort(spread(count)[:taken]), prepend=0, append=count)
    assert gaps.max() <= 4 * count / taken + 2


@pytest.mark.parametrize("ranges", [False, True])
def test_a_sample_keeps_weights_and_bounds_and_is_the_same_each_time(
    open_data: Callable[..., Any], ranges: bool
) -> None:
    catalog, _ = open_data(ranges)  # weights 3 and 1
    taken = list(sample_texts(catalog.sources, 4000))
    assert taken == list(sample_texts(catalog.sources, 4000))
    assert 3500 <= sum(map(len, taken)) <= 4000  # tiny blocks, some of them empty
    first = list(sample_texts(catalog.sources[:1], 3000))
    assert taken[: len(first)] == first


def test_a_sample_of_more_than_there_is_holds_every_document(open_data: Callable[..., Any]) -> None:
    catalog, _ = open_data()
    taken = list(sample_texts(catalog.sources, 10**9))
    assert len(taken) == 90 + 60
