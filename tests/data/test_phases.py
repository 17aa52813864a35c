"""Phases: other weights, lengths and batch sizes from a window on, the same for every rank and restart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from data.streaming import Opened, PlainRow, loaders, plain, replayed, rows_of
from hypothesis import given, settings
from hypothesis import strategies as st

from flame.data.catalog import fingerprint, fingerprint_difference
from flame.data.config import DataConfig, PhaseConfig, SourceConfig
from flame.data.loader import Loader
from flame.data.plan import DataPlan
from flame.data.preview import preview
from flame.errors import RecipeError
from flame.schema import Duration

OpenData = Callable[..., Opened]
STEPS = 40
# weights alone; longer rows, fewer of them; more rows, shorter pieces
PHASES = [
    PhaseConfig(Duration(8, "steps"), weights={"s0": 1.0}),
    PhaseConfig(Duration(9000, "tokens"), {"s1": 9.0}, sequence_length=128, tokens_per_step=3 * 128),
    PhaseConfig(Duration(31, "steps"), tokens_per_step=9 * 128, max_document_length=50),
]


def plan_of(phases: list[PhaseConfig], tokens_per_step: int = 6 * 64, **changed: Any) -> DataPlan:
    sources = [SourceConfig("s0", ["x"], weight=3.0), SourceConfig("s1", ["y"])]
    config = DataConfig(sources, sequence_length=64, phases=phases, **{"window_steps": 4, **changed})
    return DataPlan.of(config, tokens_per_step, seed=1)


@pytest.fixture(scope="module")
def phased(open_data: OpenData) -> Opened:
    return open_data(phases=PHASES)


@pytest.fixture(scope="module")
def stream(phased: Opened) -> list[list[PlainRow]]:
    (loader,) = loaders(phased, 1)
    return [plain(rows_of([loader.next_step()])) for _ in range(STEPS)]


RUNS = st.lists(st.tuples(st.integers(1, 3), st.integers(0, 15), st.integers(0, 5)), min_size=2, max_size=5)


@settings(max_examples=40, deadline=None)
@given(runs=RUNS)
def test_restarts_in_any_phase_on_any_ranks_go_on_with_the_same_rows(
    phased: Opened, stream: list[list[PlainRow]], runs: list[tuple[int, int, int]]
) -> None:
    got = [plain(rows_of(parts)) for _, parts in zip(range(STEPS), replayed(phased, runs), strict=False)]
    assert got == stream[: len(got)]


@settings(max_examples=25, deadline=None)
@given(runs=st.lists(st.tuples(st.integers(1, 9), st.integers(0, 15), st.just(1)), min_size=2, max_size=4))
def test_more_ranks_than_lanes_read_on_where_the_rows_per_step_change(
    open_data: OpenData, runs: list[tuple[int, int, int]]
) -> None:
    phases = [
        PhaseConfig(Duration(6, "steps"), tokens_per_step=12 * 64),
        PhaseConfig(Duration(12, "steps"), tokens_per_step=10 * 64),
    ]
    data = open_data(rows=14, lanes=2, phases=phases)
    (loader,) = loaders(data, 1)
    for parts in replayed(data, [(9, 1, 0), *runs]):
        if parts[0].step >= STEPS:
            break
        while (alone := loader.next_step()).step < parts[0].step:
            pass
        assert plain(rows_of(parts)) == plain(rows_of([alone]))
        assert (sum(part.state for part in parts) == alone.state).all()


def test_rows_are_full_and_numbered_through_every_phase(phased: Opened) -> None:
    _, plan = phased
    (loader,) = loaders(phased, 1)
    number = tokens = 0
    for step in range(STEPS):
        got = loader.next_step()
        stage = plan.stage_of(plan.window_at(step)[0])
        assert plan.steps_of(Duration(tokens + 1, "tokens")) == step + 1
        assert plan.first_row(step) == number
        rows = rows_of([got])
        assert [row.index for row in rows] == list(range(number, number + stage.rows_per_step))
        assert {sum(s.length for s in row.segments) for row in rows} == {stage.sequence_length}
        assert max(s.length for row in rows for s in row.segments) <= stage.max_document_length
        number += len(rows)
        tokens += got.counts.tokens
    shapes = [(s.first_step, s.sequence_length, s.rows_per_step, s.max_document_length) for s in plan.stages]
    assert shapes == [(0, 64, 6, 64), (11, 64, 6, 64), (27, 128, 3, 128), (31, 128, 9, 50)]


def test_shares_hold_in_each_phase_from_its_beginning(phased: Opened) -> None:
    _, plan = phased
    (loader,) = loaders(phased, 1)
    columns = [loader.columns.index(f"s{i}.tokens") for i in range(2)]
    ends = 0
    begun = now = np.zeros((3, 2), dtype=np.int64)
    for step in range(STEPS):
        stage = plan.stage_of(plan.window_at(step)[0])
        if step == stage.first_step:
            begun = now
        state = loader.next_step().state
        now = state[:, columns]
        if state[0, 1] == 0:
            ends += 1
            share = np.array(stage.weights) / sum(stage.weights)
            of_phase = now - begun
            off = np.abs(of_phase - of_phase.sum(1, keepdims=True) * share)
            assert (off <= stage.sequence_length).all(), step
    assert ends > 8


@pytest.mark.parametrize("start", [0, 10, 26, 30])
def test_preview_knows_phases(phased: Opened, stream: list[list[PlainRow]], start: int) -> None:
    assert [plain(rows) for rows in preview(*phased, range(start, start + 3), 2)] == stream[start : start + 3]


def test_micro_batches_are_sized_for_each_phase(phased: Opened) -> None:
    loader = Loader(*phased, 0, 1, [3, 2, 1, 9], prefetch=False)
    shapes = [tuple(loader.next_step().micro_batches[0].tokens.shape) for _ in range(STEPS)]
    assert [shapes[step] for step in (10, 11, 27, 31)] == [(3, 64), (2, 64), (1, 128), (9, 128)]


@given(step=st.integers(1, 200), window_steps=st.integers(1, 32), tokens=st.booleans())
def test_phases_begin_at_the_first_window_at_or_past_their_threshold(
    step: int, window_steps: int, tokens: bool
) -> None:
    at = Duration(step * 6 * 64 - 5, "tokens") if tokens else Duration(step, "steps")
    plan = plan_of([PhaseConfig(at, tokens_per_step=12 * 64)], window_steps=window_steps)
    first, second = plan.stages
    assert second.first_step >= step
    before, start = first.window_at(second.first_step - 1)
    assert start < step
    assert second.first_window == before + 1
    assert second.first_row == 6 * second.first_step
    assert plan.window_at(second.first_step) == (second.first_window, second.first_step)
    assert plan.window_at(second.first_step - 1) == (before, start)


def test_lanes_default_to_a_divisor_of_the_rows_of_every_phase() -> None:
    phase = PhaseConfig(Duration(9, "steps"), tokens_per_step=40 * 64)
    assert plan_of([phase], tokens_per_step=60 * 64).lanes == 20
    with pytest.raises(RecipeError, match=r"divisor of the 60 and 40 rows.*such as 20"):
        plan_of([phase], tokens_per_step=60 * 64, lanes=30)


@pytest.mark.parametrize(
    ("phase", "says"),
    [
        (PhaseConfig(Duration(0, "steps")), r"phases\[0\].at: 0 steps"),
        (PhaseConfig(Duration(9, "steps"), {"S0": 1.0}), r'phases\[0\].weights: no source is called "S0"'),
        (PhaseConfig(Duration(9, "steps"), {"s0": -1.0}), r"phases\[0\].weights.s0: found -1"),
        (PhaseConfig(Duration(9, "steps"), {"s0": 0.0, "s1": 0.0}), "every weight is 0"),
        (PhaseConfig(Duration(9, "steps"), sequence_length=100), r"phases\[0\].tokens_per_step: found 384"),
        (PhaseConfig(Duration(9, "steps"), max_document_length=65), r"phases\[0\].max_document_length"),
    ],
)
def test_phases_that_cannot_be_are_refused(phase: PhaseConfig, says: str) -> None:
    with pytest.raises(RecipeError, match=says):
        plan_of([phase])


def test_two_phases_at_one_window_are_refused() -> None:
    phases = [PhaseConfig(Duration(n, "steps"), {"s0": float(n)}) for n in (40, 41)]
    with pytest.raises(RecipeError, match=r"phases\[1\].at: 41 steps"):
        plan_of(phases, window_steps=32)


def test_the_fingerprint_knows_phases(open_data: OpenData, phased: Opened) -> None:
    other = open_data(phases=[*PHASES[:2], PhaseConfig(Duration(31, "steps"), {"s1": 2.0})])
    difference = fingerprint_difference(fingerprint(*phased), fingerprint(*other))
    assert difference == "stages[3].rows_per_step: 9 when the run began, 3 now"
