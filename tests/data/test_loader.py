"""The promise of the loader: one stream of rows, whatever the ranks, the threads and the restarts."""

from __future__ import annotations

import pickle
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from data.streaming import (
    Opened,
    PlainRow,
    assert_tiled,
    documents,
    loaders,
    plain,
    replayed,
    rows_of,
    some_runs,
    state_after,
    trained,
)
from hypothesis import given, settings

from flame.batch import COUNTED, IGNORED, StepRows
from flame.data import tokens
from flame.data.catalog import open_readers
from flame.data.hashes import of_bytes
from flame.data.lanes import Lane
from flame.data.preview import preview
from flame.data.state import DataState
from flame.errors import DataError, RecipeError

OpenData = Callable[..., Opened]
STEPS = 40


@pytest.fixture(scope="module")
def stream(open_data: OpenData) -> Callable[[bool], list[list[object]]]:
    """The reference: the rows of the first steps on one rank."""
    known: dict[bool, list[list[object]]] = {}

    def steps_of(ranges: bool) -> list[list[object]]:
        if ranges not in known:
            (loader,) = loaders(open_data(ranges), 1)
            known[ranges] = [plain(rows_of([loader.next_step()])) for _ in range(STEPS)]
        return known[ranges]

    return steps_of


# ------------------------------------------------------------------------------ one stream


@pytest.mark.parametrize("world", range(1, 7))
@pytest.mark.parametrize("ranges", [False, True])
def test_any_number_of_ranks_reads_the_same_rows(
    open_data: OpenData, stream, ranges: bool, world: int
) -> None:
    data = open_data(ranges)
    ranks = loaders(data, world)
    digests = []
    for step in range(STEPS):
        parts = [rank.next_step() for rank in ranks]
        assert plain(rows_of(parts)) == stream(ranges)[step]
        assert len({len(part.micro_batches) for part in parts}) == 1
        total = sum(part.counts.digest for part in parts)
        digests.append((total + 2**63) % 2**64 - 2**63)
    (one,) = loaders(data, 1)
    assert digests == [one.next_step().counts.digest for _ in range(STEPS)]


@pytest.mark.parametrize("world", [1, 4, 8, 9, 12])
def test_more_ranks_than_lanes_and_uneven_shares(open_data: OpenData, world: int) -> None:
    data = open_data(rows=12, lanes=4)
    expected = list(preview(*data, range(12), 1))
    ranks = loaders(data, world)
    saved = []
    for step in range(12):
        parts = [rank.next_step() for rank in ranks]
        assert plain(rows_of(parts)) == plain(expected[step])
        assert [row.index for row in rows_of(parts)] == list(range(step * 12, step * 12 + 12))
        saved.append(parts)
    (one,) = loaders(data, 1)
    for parts in saved:  # records, skips and state are reported once, by the lanes' owners
        alone = one.next_step()
        assert (sum(part.state for part in parts) == alone.state).all()
        assert (sum(part.records for part in parts) == alone.records).all()
        assert sorted(skip for part in parts for skip in part.skips) == sorted(alone.skips)


def replay(
    data: Opened, restarts: list[tuple[int, int, int]], save_prefetched: bool
) -> Iterator[list[PlainRow]]:
    """The rows of `replayed`; `save_prefetched` saves, wrongly, the state of what was only read ahead."""
    return (plain(rows_of(parts)) for parts in replayed(data, restarts, save_prefetched))


@pytest.mark.parametrize("ranges", [False, True])
@settings(max_examples=40, deadline=None)
@given(restarts=some_runs(2, 6, 7))
def test_restarts_anywhere_on_any_ranks_go_on_with_the_same_rows(
    open_data: OpenData, stream, ranges: bool, restarts: list[tuple[int, int, int]]
) -> None:
    got = list(replay(open_data(ranges), restarts, save_prefetched=False))
    assert got == stream(ranges)[: len(got)]


def test_the_state_of_prefetched_rows_would_lose_rows(open_data: OpenData, stream) -> None:
    """The control of the test above: it fails where the wrong state is saved."""
    got = list(replay(open_data(), [(2, 3, 2), (3, 3, 0)], save_prefetched=True))
    assert got != stream(False)[: len(got)]


def test_threads_give_the_same_steps_and_state(open_data: OpenData) -> None:
    data = open_data()
    with loaders(data, 1, prefetch=True)[0] as threaded:
        (plainly,) = loaders(data, 1)
        for _ in range(STEPS):
            a, b = threaded.next_step(), plainly.next_step()
            assert plain(list(a.rows)) == plain(list(b.rows))
            assert (a.state == b.state).all()
            assert a.wait_seconds >= 0


def test_reported_records_sum_to_the_state_across_restarts(open_data: OpenData) -> None:
    data = open_data()
    total = np.zeros((2, len(COUNTED)), dtype=np.int64)
    named: list[object] = []
    state = None
    for world, steps in ((1, 5), (2, 9), (4, 11), (3, 2)):
        ranks = loaders(data, world, state)
        for _ in range(steps):
            parts = [rank.next_step() for rank in ranks]
            total += sum(part.records for part in parts)
            named += [skip for part in parts for skip in part.skips]
        state = state_after(data, parts, ranks[0].columns)
    columns = [f"s{i}.{name}" for i in range(2) for name in COUNTED]
    sums = [int(state.lanes[:, state.columns.index(name)].sum()) for name in columns]
    assert sums == total.reshape(-1).tolist()
    assert len(named) == len(set(named)) == total[:, 1].sum() > 0


def test_parts_of_a_long_text_stay_in_order_and_resume(
    open_data: OpenData, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokens, "PART_BYTES", 256)
    data = open_data()
    (loader,) = loaders(data, 1)
    steps = [loader.next_step() for _ in range(20)]
    for at in range(19):
        (resumed,) = loaders(data, 1, state_after(data, [steps[at]], loader.columns))
        assert plain(list(resumed.next_step().rows)) == plain(list(steps[at + 1].rows))
    names = {s.document_id for got in steps for row in got.rows for s in row.segments}
    parts = {name.partition("#")[0]: 0 for name in names if "#" in name}
    for name in names & {f"{name}#{i}" for name in parts for i in range(99)}:
        parts[name.partition("#")[0]] += 1
    assert max(parts.values()) > 10
    assert names.isdisjoint(parts)


def test_a_catalog_travels(open_data: OpenData, stream) -> None:
    catalog, plan = pickle.loads(pickle.dumps(open_data()))
    (loader,) = loaders((catalog, plan), 1)
    assert plain(rows_of([loader.next_step()])) == stream(False)[0]


def test_another_seed_is_another_stream(open_data: OpenData, stream) -> None:
    (loader,) = loaders(open_data(seed=8), 1)
    assert plain(rows_of([loader.next_step()])) != stream(False)[0]


# ---------------------------------------------------------------------- documents and shares


@pytest.mark.parametrize("ranges", [False, True])
@pytest.mark.parametrize("piece", [64, 24])
def test_every_document_of_an_epoch_is_tiled_once(open_data: OpenData, ranges: bool, piece: int) -> None:
    data = open_data(ranges, max_document_length=piece)
    (loader,) = loaders(data, 1)
    steps: list[list[StepRows]] = []
    while (got := loader.next_step()).epoch < 2:
        steps.append([got])
    found = trained(steps)
    for segments in found.values():
        assert all(offset // piece == (offset + length - 1) // piece for offset, length in segments)
    expected = documents(data)
    assert {(source, name) for source, epoch, name in found if epoch < 2} == set(expected)
    for (source, name), length in expected.items():
        for epoch in range(2):
            assert_tiled(found[source, epoch, name], length)
    begun, cut = (sum(getattr(part.counts, of) for (part,) in steps) for of in ("documents", "cut"))
    assert begun > cut > 0


def test_tokens_of_a_row_are_the_tokens_of_its_documents(open_data: OpenData) -> None:
    catalog, _ = data = open_data()
    tokenizer = catalog.load_tokenizer()
    (loader,) = loaders(data, 1)
    readers = {source.name: source.open() for source in catalog.sources}
    files = {(s.name, file.name): i for s in catalog.sources for i, file in enumerate(s.files)}
    for row in [row for _ in range(8) for row in loader.next_step().rows if row.segments]:
        start = 0
        for source, _, document, offset, length in row.segments:
            name, position = document.rsplit(":", 1)
            reader = readers[source]
            content = reader.read(files[source, name], int(position), int(position) + 1)
            text = reader.decode(content[0][1])
            (ids,) = tokenizer.encode([str(text)])
            found = row.tokens[start : start + length]
            assert found.tolist() == ids[offset : offset + length].tolist()
            start += length
        assert start == len(row.tokens)


@pytest.mark.parametrize("weights", [(3.0, 1.0), (0.9, 0.05), (1.0, 0.0)])
def test_shares_hold_within_a_row_at_every_windows_end(
    open_data: OpenData, weights: tuple[float, float]
) -> None:
    named = (("a.jsonl", weights[0]), ("p/*.parquet", weights[1]), ("t", weights[1]))
    _, plan = data = open_data(files=named)
    (loader,) = loaders(data, 1)
    columns = [loader.columns.index(f"s{i}.tokens") for i in range(3)]
    ends = 0
    for _ in range(STEPS):
        state = loader.next_step().state
        if state[0, 1] == 0:
            ends += 1
            given_tokens = state[:, columns]
            share = np.array([w for _, w in named]) / sum(w for _, w in named)
            assert (
                np.abs(given_tokens - given_tokens.sum(1, keepdims=True) * share)
                <= plan.stages[0].sequence_length
            ).all()
    assert ends > 5


# ----------------------------------------------------------------------------------- batches


def test_labels_never_cross_segments_and_positions_restart(open_data: OpenData) -> None:
    data = open_data()
    for got in [rank.next_step() for rank in loaders(data, 4)]:
        predicted = 0
        for i, batch in enumerate(got.micro_batches):
            rows = got.rows[2 * i : 2 * i + 2]
            assert batch.first_row == rows[0].index
            ends = [0]
            for row, ids, labels, positions in zip(
                rows, batch.tokens, batch.labels, batch.positions, strict=True
            ):
                assert ids.tolist() == row.tokens.tolist()
                lengths = [s.length for s in row.segments] or [64]
                expected_labels: list[int] = []
                expected_positions: list[int] = []
                for length in lengths:
                    start = len(expected_labels)
                    inside = row.tokens[start + 1 : start + length].tolist()
                    expected_labels += [*(inside if row.segments else [IGNORED] * len(inside)), IGNORED]
                    expected_positions += range(length)
                    ends.append(ends[-1] + length)
                assert labels.tolist() == expected_labels
                assert positions.tolist() == expected_positions
            assert batch.cu_seqlens.tolist() == ends
            assert batch.longest_segment == max(np.diff(ends))
            predicted += int((batch.labels != IGNORED).sum())
        lengths = [s.length for row in got.rows for s in row.segments]
        assert got.counts.predicted == predicted
        assert got.counts.tokens == sum(lengths)
        assert got.counts.attended == sum(n * (n + 1) // 2 for n in lengths)


def test_missing_rows_are_filler_that_counts_nowhere(open_data: OpenData) -> None:
    parts = [rank.next_step() for rank in loaders(open_data(), 4)]  # 6 rows, at most 2 a rank
    assert [len(part.rows) for part in parts] == [2] * 4
    assert [part.counts.tokens for part in parts] == [128, 128, 64, 64]
    filler = parts[3].rows[1]
    assert filler.index == -1
    assert (parts[3].micro_batches[0].labels[1] == IGNORED).all()


# ------------------------------------------------------------------------------------ faults


def test_more_ranks_than_rows_are_refused(open_data: OpenData) -> None:
    with pytest.raises(RecipeError, match=r"use at most 6, or set batch.tokens_per_step to at least 448"):
        loaders(open_data(), 7)


def test_a_window_that_changed_is_refused_with_lane_and_files(open_data: OpenData) -> None:
    data = open_data()
    (loader,) = loaders(data, 1)
    while (got := loader.next_step()).state[0, 1] == 0:
        pass
    state = state_after(data, [got], loader.columns)
    state.lanes[1, state.columns.index("window_hash")] += 1
    ranks = loaders(data, 3, state)
    ranks[0].next_step()
    with pytest.raises(DataError, match=r"lane 1: window \d.*a\.jsonl"):
        ranks[1].next_step()


def test_a_state_with_the_window_hashes_of_an_earlier_version_goes_on(open_data: OpenData) -> None:
    catalog, plan = data = open_data()
    (loader,) = loaders(data, 1)
    while (got := loader.next_step()).state[0, 1] == 0:
        pass
    state = state_after(data, [got], loader.columns)
    readers, tokenizer = open_readers(catalog, plan), catalog.load_tokenizer()
    for number, of_lane in enumerate(state.lanes):
        lane = Lane(plan, readers, tokenizer, number)
        windows = [lane.next_window() for _ in range(of_lane[0] + 1)]
        of_lane[state.columns.index("window_hash")] = of_bytes(windows[-1].rows.tokens)
    (resumed,) = loaders(data, 1, state)
    assert plain(rows_of([resumed.next_step()])) == plain(rows_of([loader.next_step()]))


def test_a_state_of_other_data_is_refused(open_data: OpenData) -> None:
    data = open_data()
    (loader,) = loaders(data, 1)
    state = state_after(data, [loader.next_step()], loader.columns)
    with pytest.raises(DataError, match="3 lanes"):
        loaders(open_data(rows=12, lanes=4), 1, state)
    torn = DataState(state.next_step + 9, state.lanes, state.columns, {})
    with pytest.raises(DataError, match="torn"):
        loaders(data, 1, torn)[0].next_step()
    with pytest.raises(DataError, match="not a data state"):
        DataState.from_json({"next_step": 1})


@pytest.mark.parametrize("prefetch", [False, True])
def test_a_failed_read_is_raised_now_and_ever_after(
    open_data: OpenData, folder: Path, prefetch: bool
) -> None:
    copy = folder / f"gone-{prefetch}.jsonl"
    copy.write_bytes((folder / "a.jsonl").read_bytes())
    data = open_data(files=((copy.name, 1.0),))
    copy.unlink()
    (loader,) = loaders(data, 1, prefetch=prefetch)
    for _ in range(2):
        with pytest.raises(DataError, match=copy.name):
            loader.next_step()
    loader.close()


def test_closing_never_hangs(open_data: OpenData) -> None:
    before = time.monotonic()
    for steps in (0, 1, 9):
        with loaders(open_data(), 1, prefetch=True)[0] as loader:
            for _ in range(steps):
                loader.next_step()
        loader.close()
        with pytest.raises(DataError, match="closed"):
            loader.next_step()
    assert time.monotonic() - before < 10
    assert not [t for t in threading.enumerate() if t.name.startswith("flame-data")]


# ----------------------------------------------------------------------------------- preview


@pytest.mark.parametrize(("start", "world"), [(0, 3), (1, 1), (13, 2), (30, 5)])
def test_preview_shows_what_the_loader_gives(open_data: OpenData, stream, start: int, world: int) -> None:
    shown = preview(*open_data(), range(start, start + 6), world)
    assert [plain(rows) for rows in shown] == stream(False)[start : start + 6]


def test_preview_of_no_steps_is_empty(open_data: OpenData) -> None:
    assert list(preview(*open_data(), range(3, 3), 1)) == []


# ---------------------------------------------------------------------------------- counters


@pytest.mark.parametrize("piece", [64, 24])
@pytest.mark.parametrize("world", [1, 5])
def test_a_cut_document_is_counted_once(open_data: OpenData, piece: int, world: int) -> None:
    data = open_data(max_document_length=piece)
    lengths = documents(data)
    total = np.zeros((2, 3), dtype=np.int64)
    cut: list[set[tuple[int, str]]] = [set(), set()]
    segments = 0
    for parts in replayed(data, [(world, 13, 2), (world, 9, 1), (1, 17, 0)]):  # up to a window's end
        total += sum(part.sources for part in parts)
        assert sum(part.sources for part in parts)[:, 2].sum() == sum(part.counts.cut for part in parts)
        for source, epoch, document, offset, length in (s for row in rows_of(parts) for s in row.segments):
            end = min(lengths[source, document], (offset // piece + 1) * piece)
            if offset + length < end:
                cut[int(source[1:])].add((epoch, document))
                segments += 1
    assert total[:, 2].tolist() == [len(documents) for documents in cut]
    assert segments > total[:, 2].sum() > 20, "some are cut more than once"
