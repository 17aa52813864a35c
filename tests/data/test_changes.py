"""Files that are moved, added or changed between two starts of a run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
from data.conftest import texts
from data.streaming import Opened, loaders, plain, rows_of, state_after, tokens_in

from flame.batch import StepRows
from flame.data.catalog import open_catalog
from flame.data.changes import rejoin
from flame.data.config import DataConfig, SourceConfig, TokenizerConfig
from flame.data.plan import DataPlan
from flame.data.state import DataState
from flame.errors import DataError

OpenHere = Callable[..., Opened]


@pytest.fixture
def open_here(folder: Path, tmp_path: Path) -> OpenHere:
    """Opens NAME/*.txt (150 files at first) in tmp_path, four epochs of it."""
    (tmp_path / "one").mkdir()
    for i, text in enumerate(texts(9, 150)):
        (tmp_path / "one" / f"{i}.txt").write_text(text)

    def open_it(name: str = "one", seed: int = 7) -> Opened:
        sources = [SourceConfig("s", [f"{name}/*.txt"], max_epochs=4)]
        config = DataConfig(sources, sequence_length=64, lanes=3, window_steps=4)
        plan = DataPlan.of(config, 6 * 64, seed)
        return open_catalog(config, TokenizerConfig(str(folder / "tok")), plan, tmp_path), plan

    return open_it


def stop_after(data: Opened, steps: int) -> DataState:
    (loader,) = loaders(data, 1)
    for _ in range(steps):
        part = loader.next_step()
    return state_after(data, [part], loader.columns)


def go_on(data: Opened, state: DataState, world: int) -> list[list[StepRows]]:
    ranks = loaders(data, world, state)
    steps: list[list[StepRows]] = []
    while tokens_in(parts := [rank.next_step() for rank in ranks]):
        steps.append(parts)
    return steps


def by_epoch(steps: list[list[StepRows]]) -> dict[int, dict[str, int]]:
    """The tokens trained of each document, by epoch."""
    found: dict[int, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for row in (row for parts in steps for row in rows_of(parts)):
        for segment in row.segments:
            found[segment.epoch][segment.document_id] += segment.length
    return found


def test_a_moved_folder_is_the_same_data(open_here: OpenHere, tmp_path: Path) -> None:
    data = open_here()
    state = stop_after(data, 9)
    expected = [plain(rows_of(parts)) for parts in go_on(data, state, 1)]
    (tmp_path / "one").rename(tmp_path / "two")
    catalog, plan = open_here("two")
    found = rejoin(catalog, plan, state, accept=False)
    assert found.changes == []
    assert [plain(rows_of(parts)) for parts in go_on((found.catalog, plan), found.state, 2)] == expected


@pytest.mark.parametrize("stopped_after", [2, 5, 9])
@pytest.mark.parametrize("each_document", [True, False])
def test_appended_files_join_at_the_epoch_after_the_last_one_begun(
    open_here: OpenHere,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stopped_after: int,
    each_document: bool,
) -> None:
    if not each_document:
        monkeypatch.setattr("flame.data.blocks.INDEX_BELOW", 0)
    before = open_here()
    state = stop_after(before, stopped_after)
    old = by_epoch(go_on(before, state, 1))
    first = int(state.lanes[:, state.columns.index("s.begun")].max()) + 1
    (tmp_path / "one" / "00.txt").write_text(texts(3, 1)[0])
    catalog, plan = open_here()
    with pytest.raises(DataError, match="accept-changed-sources"):
        rejoin(catalog, plan, state, accept=False)
    found = rejoin(catalog, plan, state, accept=True)
    assert found.changes == ['source "s": 00.txt is new']
    data = found.catalog, plan
    steps = go_on(data, found.state, 2)
    new = by_epoch(steps)
    assert 0 < first < 4
    for epoch in range(4):
        assert ("00.txt:0" in new[epoch]) == (epoch >= first)
        new[epoch].pop("00.txt:0", None)
        assert new[epoch] == old[epoch], "what was there is trained as before"

    # the next start knows when they joined, and asks nothing
    ranks = loaders(data, 3, found.state)
    parts = [[rank.next_step() for rank in ranks] for _ in range(5)][-1]
    again = rejoin(*open_here(), state_after(data, parts, ranks[0].columns), accept=False)
    assert again.changes == []
    rest = go_on((again.catalog, plan), again.state, 1)
    assert [plain(rows_of(p)) for p in rest] == [plain(rows_of(p)) for p in steps[5:]]


@pytest.mark.parametrize("change", ["gone", "changed"])
def test_where_a_file_is_gone_or_changed_the_next_epoch_begins_at_once(
    open_here: OpenHere, tmp_path: Path, change: str
) -> None:
    state = stop_after(open_here(), 9)
    first = int(state.lanes[:, state.columns.index("s.begun")].max()) + 1
    file = tmp_path / "one" / "17.txt"
    file.unlink() if change == "gone" else file.write_text("something else")
    catalog, plan = open_here()
    with pytest.raises(DataError, match=r"sources\[s\].files"):
        rejoin(catalog, plan, state, accept=False)
    found = rejoin(catalog, plan, state, accept=True)
    assert len(found.changes) == 1
    assert change in found.changes[0]
    trained = by_epoch(go_on((found.catalog, plan), found.state, 2))
    assert sorted(trained) == list(range(first, 4))
    assert all(len(trained[e]) == 150 - (change == "gone") for e in range(first + 1, 4))


def test_nothing_but_files_may_change(open_here: OpenHere, tmp_path: Path) -> None:
    state = stop_after(open_here(), 5)
    (tmp_path / "one" / "00.txt").write_text("new")
    with pytest.raises(DataError, match="seed: 7 when the run began, 8 now"):
        rejoin(*open_here(seed=8), state, accept=True)
