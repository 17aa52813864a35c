"""packing = "document": no document is cut, rows are padded, and the order is as exact as with full rows."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable
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

from flame.batch import COUNTED, IGNORED, StepRows
from flame.data.catalog import fingerprint
from flame.data.packing import LENGTH as TOKENS
from flame.data.packing import PIECE, ROW, pack_whole
from flame.errors import DataError

OpenData = Callable[..., Opened]
LENGTH = 128  # of a row; some documents are far longer
STEPS = 40


def whole(open_data: OpenData, ranges: bool = False, **changed: object) -> Opened:
    settings = {"sequence_length": LENGTH, "packing": "document", "rows": 9, **changed}
    return open_data(ranges, **settings)


@pytest.fixture(scope="module")
def stream(open_data: OpenData) -> Callable[..., list[list[object]]]:
    """The reference: the rows of the first steps on one rank."""
    known: dict[str, list[list[object]]] = {}

    def steps_of(**changed: object) -> list[list[object]]:
        if (key := repr(changed)) not in known:
            (loader,) = loaders(whole(open_data, **changed), 1)
            known[key] = [plain(rows_of([loader.next_step()])) for _ in range(STEPS)]
        return known[key]

    return steps_of


# ---------------------------------------------------------------------------------- packing


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(1, 8))
def test_the_first_documents_are_laid_out_uncut_until_none_has_room(lengths: list[int], rows: int) -> None:
    placed, count = pack_whole(np.array(lengths, dtype=np.int64), 50, rows)
    assert sorted(placed[:, PIECE].tolist()) == list(range(count))
    assert placed[:, TOKENS].tolist() == [lengths[i] for i in placed[:, PIECE]]
    rooms = (50 - np.bincount(placed[:, ROW], placed[:, TOKENS], rows)).tolist()
    assert len(rooms) == rows and min(rooms) >= 0
    assert count == len(lengths) or lengths[count] > max(rooms)


# -------------------------------------------------------------------------------- one stream


@pytest.mark.parametrize("ranges", [False, True])
@settings(max_examples=30, deadline=None)
@given(runs=some_runs(2, 9, 7))
def test_restarts_anywhere_on_any_ranks_go_on_with_the_same_whole_documents(
    open_data: OpenData, stream, ranges: bool, runs: list[tuple[int, int, int]]
) -> None:
    data = whole(open_data, ranges)
    got = [plain(rows_of(parts)) for parts in replayed(data, runs)]
    assert got == stream(ranges=ranges)[: len(got)]


@pytest.mark.parametrize("overlong", ["skip", "cut"])
@settings(max_examples=20, deadline=None)
@given(runs=some_runs(1, 9, 9), world=st.integers(1, 9))
def test_every_whole_document_is_trained_exactly_max_epochs_times(
    open_data: OpenData, overlong: str, runs: list[tuple[int, int, int]], world: int
) -> None:
    data = whole(open_data, max_epochs=(2, 1), overlong=overlong)
    found = trained(replayed(data, [*runs, (world, 99, 0)]))
    expected = documents(data)
    for (source, name), tokens in expected.items():
        for epoch in range(2 - int(source[1:])):
            segments = found.pop((source, epoch, name), [])
            if tokens <= LENGTH:
                assert segments == [(0, tokens)]
            elif overlong == "skip":
                assert segments == []
            else:
                assert_tiled(segments, tokens)
                assert all(offset % LENGTH == 0 for offset, _ in segments)
    assert not found


@pytest.mark.parametrize("at_source_end", ["redistribute", "stop"])
@settings(max_examples=20, deadline=None)
@given(runs=some_runs(0, 9, 9))
def test_restarts_around_the_end_go_on_with_the_same_whole_documents(
    open_data: OpenData, at_source_end: str, runs: list[tuple[int, int, int]]
) -> None:
    data = whole(open_data, max_epochs=(2, 1), at_source_end=at_source_end)
    reference = [plain(rows_of(parts)) for parts in until_the_end(data)]
    got = [plain(rows_of(parts)) for parts in replayed(data, [(2, len(reference) - 4, 0), *runs])]
    assert got == (reference + [[]] * len(got))[: len(got)]


def until_the_end(data: Opened) -> list[list[StepRows]]:
    (loader,) = loaders(data, 1)
    return list(itertools.takewhile(tokens_in, ([loader.next_step()] for _ in range(999))))


def test_a_lane_that_stops_gives_all_that_its_turns_gave_before(open_data: OpenData) -> None:
    data = whole(open_data, max_epochs=(1, None), at_source_end="stop")
    found = trained(until_the_end(data))
    for (source, name), tokens in documents(data).items():
        if source == "s0":
            assert_tiled(found.pop((source, 0, name)), tokens)
    assert {source for source, *_ in found} == {"s1"}


@pytest.mark.parametrize("at_source_end", ["redistribute", "stop"])
@pytest.mark.parametrize("seed", range(6))
def test_the_documents_of_a_run_are_the_same_however_they_fall_into_windows(
    open_data: OpenData, at_source_end: str, seed: int
) -> None:
    asked = {"seed": seed, "max_epochs": (1, 1), "at_source_end": at_source_end, "sequence_length": 160}
    found = [
        set(trained(until_the_end(whole(open_data, rows=rows, window_steps=steps, **asked))))
        for rows, steps in ((3, 1), (3, 4), (12, 2))
    ]
    assert found[0] == found[1] == found[2]


def test_the_state_of_rows_only_read_ahead_would_lose_documents(open_data: OpenData, stream) -> None:
    """The control: the test above fails where the wrong state is saved."""
    runs = [(2, 3, 2), (3, 3, 0)]
    got = [plain(rows_of(parts)) for parts in replayed(whole(open_data), runs, save_prefetched=True)]
    assert got != stream(ranges=False)[: len(got)]


def test_restarts_through_phases_keep_documents_whole(open_data: OpenData) -> None:
    from flame.data.config import PhaseConfig
    from flame.schema import Duration

    phases = [
        PhaseConfig(Duration(5, "steps"), sequence_length=96, tokens_per_step=9 * 96),
        PhaseConfig(Duration(12, "steps"), weights={"s1": 9.0}, max_document_length=50),
    ]
    data = whole(open_data, phases=phases)
    (loader,) = loaders(data, 1)
    reference = [plain(rows_of([loader.next_step()])) for _ in range(30)]
    for at in range(0, 26, 3):
        got = [plain(rows_of(parts)) for parts in replayed(data, [(1, at, 1), (4, 30 - at, 0)])]
        assert got == reference


# ---------------------------------------------------------------------------------- the rows


def test_no_document_is_cut_and_no_full_row_is_wasted(open_data: OpenData) -> None:
    data = whole(open_data)
    lengths = documents(data)
    (loader,) = loaders(data, 1)
    tokens = padding = 0
    for _ in range(STEPS):
        got = loader.next_step()
        assert got.counts.cut == 0
        assert len([row for row in got.rows if row.segments]) == 9
        labels = np.concatenate([batch.labels.numpy() for batch in got.micro_batches])
        for row, of_row in zip(got.rows, labels, strict=True):
            real = int(row.lengths.sum())
            assert (of_row[max(0, real - 1) :] == IGNORED).all()
            for segment in row.segments:
                size = lengths[segment.source, segment.document_id]
                assert segment.offset % LENGTH == 0
                assert segment.length == min(LENGTH, size - segment.offset)
        assert got.counts.predicted == int((labels != IGNORED).sum())
        tokens, padding = tokens + got.counts.tokens, padding + got.counts.padding
        assert got.counts.tokens + got.counts.padding == 9 * LENGTH
    assert 0 < padding < 0.15 * (tokens + padding)


def test_shares_count_real_tokens_at_every_windows_end(open_data: OpenData) -> None:
    data = whole(open_data, files=(("a.jsonl", 3.0), ("p/*.parquet", 1.0), ("t", 1.0)))
    (loader,) = loaders(data, 1)
    columns = [loader.columns.index(f"s{i}.tokens") for i in range(3)]
    ends = 0
    for _ in range(STEPS):
        state = loader.next_step().state
        if state[0, 1] == 0:
            ends += 1
            given_tokens = state[:, columns]
            share = given_tokens.sum(1, keepdims=True) * np.array([3, 1, 1]) / 5
            assert (np.abs(given_tokens - share) <= LENGTH).all()
    assert ends > 5


# ----------------------------------------------------------------------- too long for a row


@pytest.mark.parametrize("packing", ["document", "window"])
def test_overlong_documents_are_counted_and_skips_are_named(open_data: OpenData, packing: str) -> None:
    for overlong in ("cut", "skip"):
        data = whole(open_data, packing=packing, overlong=overlong, max_epochs=(2, 1))
        expected = [0, 0]
        for (source, _), tokens in documents(data).items():
            expected[int(source[1:])] += (2 - int(source[1:])) * (tokens > LENGTH)
        assert sum(expected) > 3
        total, state, names = np.zeros((2, len(COUNTED)), dtype=np.int64), None, []
        for world, steps in ((1, 5), (3, 4), (2, 200)):  # counted once, whatever the restarts
            ranks = loaders(data, world, state)
            for _ in range(steps):
                parts = [rank.next_step() for rank in ranks]
                total += sum(part.records for part in parts)
                names += [skip for part in parts for skip in part.skips]
            state = state_after(data, parts, ranks[0].columns)
        assert total[:, COUNTED.index("overlong")].tolist() == expected
        long = [skip for skip in names if "longer than max_document_length" in skip.reason]
        assert len(set(names)) == len(names)
        assert len(long) == (sum(expected) if overlong == "skip" else 0)
        assert total[:, COUNTED.index("skipped")].sum() == len(names) - len(long)


def test_an_overlong_document_stops_the_run_where_that_is_asked(open_data: OpenData) -> None:
    (loader,) = loaders(whole(open_data, overlong="error"), 1)
    with pytest.raises(DataError, match=r"(line|row) \d+: \d+ tokens, longer than max_document_length = 128"):
        for _ in range(STEPS):
            loader.next_step()


def test_a_source_of_nothing_but_overlong_documents_ends_or_is_an_error(
    open_data: OpenData, folder: Path
) -> None:
    (folder / "long.jsonl").write_text('{"text": "%s"}\n' % ("a b " * 300) * 6)
    files = (("long.jsonl", 1.0), ("t", 1.0))
    with pytest.raises(DataError, match="all are too long"):
        loaders(whole(open_data, files=files, overlong="skip"), 1)[0].next_step()
    ending = whole(open_data, files=files, overlong="skip", max_epochs=(1, 1))
    assert {source for source, *_ in trained(until_the_end(ending))} == {"s1"}


def test_parts_of_a_very_long_text_are_skipped_as_one(
    open_data: OpenData, monkeypatch: pytest.MonkeyPatch
) -> None:
    from flame.data import tokens

    monkeypatch.setattr(tokens, "PART_BYTES", 256)
    data = whole(open_data, overlong="skip", max_epochs=(1, 1))
    (loader,) = loaders(data, 1)
    names: dict[str, int] = defaultdict(int)
    while (got := loader.next_step()).counts.tokens:
        assert not [s for row in got.rows for s in row.segments if "#" in s.document_id]
        for skip in got.skips:
            names[skip.document_id] += "longer than" in skip.reason
    assert any(name.endswith("#0") for name in names)
    assert max(names.values()) == 1


def test_packing_and_overlong_are_part_of_the_fingerprint(open_data: OpenData) -> None:
    made = [whole(open_data), whole(open_data, packing="window"), whole(open_data, overlong="skip")]
    assert len({str(fingerprint(*data)) for data in made}) == 3
