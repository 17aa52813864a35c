"""A source with max_epochs ends, and with the last one the run: no document is lost or trained twice."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from data.streaming import (
    Opened,
    assert_tiled,
    documents,
    loaders,
    plain,
    replayed,
    rows_of,
    some_runs,
    state_after,
    tokens_in,
    trained,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from flame.batch import IGNORED, StepRows
from flame.data.config import DataConfig, SourceConfig
from flame.data.plan import DataPlan
from flame.data.preview import preview
from flame.errors import DataError, RecipeError

OpenData = Callable[..., Opened]
EPOCHS = (2, 1)


def ending(open_data: OpenData, ranges: bool = False, **changed: object) -> Opened:
    return open_data(ranges, **{"rows": 9, "max_epochs": EPOCHS, **changed})


def until_the_end(data: Opened, world: int) -> Iterator[list[StepRows]]:
    ranks = loaders(data, world)
    while tokens_in(parts := [rank.next_step() for rank in ranks]):
        yield parts


@pytest.mark.parametrize("ranges", [False, True])
@settings(max_examples=25, deadline=None)
@given(restarts=some_runs(0, 9, 9), world=st.integers(1, 9))
def test_every_document_is_trained_exactly_max_epochs_times(
    open_data: OpenData, ranges: bool, restarts: list[tuple[int, int, int]], world: int
) -> None:
    data = ending(open_data, ranges)
    found = trained(replayed(data, [*restarts, (world, 99, 0)]))
    expected = documents(data)
    assert len(found) == sum(EPOCHS[int(source[1:])] for source, _ in expected)
    for (source, epoch, name), segments in found.items():
        assert epoch < EPOCHS[int(source[1:])]
        assert_tiled(segments, expected[source, name])


@pytest.mark.parametrize("at_source_end", ["redistribute", "stop"])
@settings(max_examples=25, deadline=None)
@given(restarts=some_runs(0, 9, 9))
def test_restarts_around_the_end_go_on_with_the_same_rows(
    open_data: OpenData, at_source_end: str, restarts: list[tuple[int, int, int]]
) -> None:
    data = ending(open_data, at_source_end=at_source_end)
    reference = [plain(rows_of(parts)) for parts in until_the_end(data, 1)]
    got = [plain(rows_of(parts)) for parts in replayed(data, [(2, len(reference) - 4, 0), *restarts])]
    assert got == (reference + [[]] * len(got))[: len(got)]


def test_a_lane_pads_its_last_row_only_and_gives_filler_from_then_on(open_data: OpenData) -> None:
    data = ending(open_data)
    lanes: dict[int, list[int]] = defaultdict(list)
    for parts in until_the_end(data, 1):
        (got,) = parts
        for row in rows_of(parts):
            lanes[row.index % 3].append(sum(segment.length for segment in row.segments))
        labels = np.concatenate([batch.labels.numpy() for batch in got.micro_batches])
        ends = np.concatenate([batch.cu_seqlens.numpy()[1:] for batch in got.micro_batches])
        for row, of_row in zip(got.rows, labels, strict=True):
            real = sum(segment.length for segment in row.segments)
            assert (of_row[real:] == IGNORED).all()
        assert got.counts.predicted == (labels != IGNORED).sum()
        assert max(ends) == 2 * 64
    assert all(set(filled[:-1]) == {64} for filled in lanes.values())
    assert any(filled[-1] < 64 for filled in lanes.values())
    assert len({len(filled) for filled in lanes.values()}) > 1, "the lanes end at different rows"


def test_the_other_sources_go_on_where_one_ends_or_the_lane_stops(open_data: OpenData) -> None:
    endless = ending(open_data, max_epochs=(1, None))
    for _, parts in zip(range(60), until_the_end(endless, 2), strict=False):
        last = {segment.source for row in rows_of(parts) for segment in row.segments}
    assert last == {"s1"}
    stopping = ending(open_data, max_epochs=(1, None), at_source_end="stop")
    found = trained(until_the_end(stopping, 2))
    first = {name for source, name in documents(stopping) if source == "s0"}
    assert {name for source, _, name in found if source == "s0"} == first
    assert {source for source, _, _ in found} == {"s0", "s1"}


def test_after_the_end_there_is_filler_for_ever_and_a_state_to_resume(open_data: OpenData) -> None:
    data = ending(open_data)
    steps = list(until_the_end(data, 1))
    ranks = loaders(data, 4, state_after(data, steps[-1], loaders(data, 1)[0].columns))
    for _ in range(20):
        parts = [rank.next_step() for rank in ranks]
        assert tokens_in(parts) == 0
        assert len({len(part.micro_batches) for part in parts}) == 1
    shown = list(preview(*data, range(len(steps) - 1, len(steps) + 2), 3))
    assert [plain(rows) for rows in shown] == [plain(rows_of(steps[-1])), [], []]


def test_a_source_of_bad_records_ends_like_any_other(open_data: OpenData, folder: Path) -> None:
    (folder / "bad.jsonl").write_text('{"text": ""}\n' * 9)
    files = (("bad.jsonl", 1.0), ("t", 1.0))
    found = trained(until_the_end(ending(open_data, files=files), 1))
    assert {source for source, _, _ in found} == {"s1"}
    with pytest.raises(DataError, match="no text in any"):
        next(until_the_end(ending(open_data, files=files, max_epochs=(None, 1)), 1))


def plan_of(at_source_end: str, *limits: int | None) -> DataPlan:
    sources = [SourceConfig(f"s{i}", ["x"], max_epochs=most) for i, most in enumerate(limits)]
    config = DataConfig(sources, sequence_length=64, at_source_end=at_source_end)
    return DataPlan.of(config, 64, seed=0)


def test_it_is_known_beforehand_whether_the_data_end() -> None:
    assert plan_of("redistribute", 1, 2).ends
    assert not plan_of("redistribute", 1, None).ends
    assert plan_of("stop", 1, None).ends
    assert not plan_of("stop", None, None).ends
    with pytest.raises(RecipeError, match='source "s1": max_epochs: found 0'):
        plan_of("stop", 1, 0)
