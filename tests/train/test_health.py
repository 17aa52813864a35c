"""What is judged of a step, and which checkpoints a rollback can count on."""

from __future__ import annotations

import math
from collections import deque
from pathlib import Path
from statistics import NormalDist

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flame.errors import CheckpointError
from flame.schema import Duration
from flame.train.health import Judged, robust_score
from flame.train.keeping import STEPS_BACK, kept
from flame.train.rollback import FILE, Range, Skipped, bad_range, read_skipped


def a_range(first: int, after: int) -> Range:
    return Range((first * 10, after * 10), (first, after), (1, 2), "", 0.0)


def test_the_score_is_in_standard_deviations_and_a_few_odd_values_do_not_widen_it() -> None:
    normal = [NormalDist(3, 0.1).inv_cdf((i + 0.5) / 100) for i in range(100)]
    assert robust_score(3.5, deque(normal))[1] == pytest.approx(5, rel=0.05)
    assert robust_score(3.5, deque([*normal, 50.0, 60.0, 70.0]))[1] == pytest.approx(5, rel=0.1)
    assert robust_score(2.03, deque([2.0] * 50))[1] == pytest.approx(1.5), "1 % of the median counts as noise"


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(1, 20)), max_size=5), st.integers(0, 80))
def test_trained_steps_are_the_stream_without_the_ranges(ranges: list[tuple[int, int]], steps: int) -> None:
    skipped = Skipped(tuple(a_range(first, first + length) for first, length in ranges))
    left = [step for step in range(300) if step not in skipped]
    assert skipped.trained(range(steps)) == left[:steps]
    assert skipped.trained(range(steps // 2, steps)) == left[steps // 2 : steps]


@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=40),
    st.integers(1, 4),
    st.none() | st.integers(1, 50),
)
def test_pruning_leaves_every_rollback_a_checkpoint(gaps: list[int], keep: int, every: int | None) -> None:
    there: list[int] = []
    saved: list[int] = []
    step = 0
    for gap in gaps:
        step += gap
        saved.append(step)
        there.append(step)
        stay = kept(there, keep, {}, None if every is None else Duration(every, "steps"))
        there = [s for s in there if s in stay]
        assert there[-keep:] == saved[-keep:]
        if every is None:
            assert len(there) <= keep + 2
        bad = step + 1  # any later step needs no older one
        if saved[0] < bad - STEPS_BACK:
            assert there[0] < bad - STEPS_BACK
    if every is not None:
        multiples = {next((s for s in saved if s >= m), None) for m in range(every, step + 1, every)}
        assert multiples - {None} <= set(there)


def test_the_rows_of_sixteen_steps_are_skipped_and_what_is_skipped_already_is_none_of_them() -> None:
    bad = Judged(step=40, data_step=55, loss=9.0, grad_norm=1.0, update_skipped=False, trouble="bad")
    skipped = Skipped((a_range(20, 36),))
    found = bad_range(bad, skipped, [20, 36], lambda step: 10 * step)
    assert (found.steps, found.data_steps, found.rows) == ((25, 41), (40, 56), (400, 560))
    found = bad_range(bad, Skipped((a_range(45, 61),)), [20, 36], lambda step: 10 * step)
    assert found.steps == (25, 41)
    found = bad_range(bad, Skipped(), [36, 38], lambda step: 10 * step)
    assert (found.steps, found.data_steps) == ((37, 41), (52, 56)), "never before the oldest checkpoint"
    found = bad_range(bad, Skipped(), [], lambda step: 10 * step)
    assert found.steps == (25, 41)
    early = Judged(step=3, data_step=2, loss=math.inf, grad_norm=1.0, update_skipped=False, trouble="bad")
    assert bad_range(early, Skipped(), [], lambda step: 10 * step).data_steps == (0, 3)


def test_a_damaged_list_of_skipped_rows_is_refused_with_where_its_copy_is(tmp_path: Path) -> None:
    assert read_skipped(tmp_path) == Skipped()
    (tmp_path / FILE).write_text('{"ranges": [{"rows": 3}]}')
    with pytest.raises(CheckpointError, match=r"data\.json holds a copy"):
        read_skipped(tmp_path)
