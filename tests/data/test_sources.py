from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flame.data import tables
from flame.data.catalog import Catalog, check_skipped, fingerprint, fingerprint_difference, open_catalog
from flame.data.config import DataConfig, SourceConfig, TokenizerConfig
from flame.data.formats import Bad
from flame.data.lines import JsonLines, PlainText
from flame.data.loader import Loader
from flame.data.plan import DataPlan
from flame.data.sources import list_files
from flame.data.tables import Parquet
from flame.errors import DataError, RecipeError


@pytest.fixture
def open_files(folder: Path, tmp_path: Path) -> Callable[..., tuple[Catalog, DataPlan]]:
    def open_it(
        *files: str, lanes: int = 2, text: str | None = None, weight: float = 1.0, base: Path = tmp_path
    ):
        config = DataConfig([SourceConfig("web", list(files), text, weight)], sequence_length=32, lanes=lanes)
        plan = DataPlan.of(config, 12 * 32, seed=3)
        return open_catalog(config, TokenizerConfig(str(folder / "tok")), plan, base), plan

    return open_it


def write_lines(path: Path, records: list[object]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


# -------------------------------------------------------------------------------------- files


def test_files_are_named_from_the_fixed_prefix_in_byte_order(tmp_path: Path) -> None:
    for name in ("b/x.txt", "b/Z.txt", "a/é.txt", "a/b/y.txt", "a/.hidden.txt", "a/other.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")

    def names(*files: str) -> list[str]:
        return [name for name, _ in list_files(SourceConfig("s", list(files)), tmp_path)]

    assert names("*/*.txt") == ["a/é.txt", "b/Z.txt", "b/x.txt"]
    assert names("a") == ["b/y.txt", "é.txt"]
    assert names("a/**/*.txt") == ["b/y.txt", "é.txt"]
    assert names("b/x.txt", "a/b/*.txt", "b/*.txt") == ["a/b/y.txt", "b/Z.txt", "b/x.txt"]
    assert names("b/x.txt") == ["x.txt"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.jsonl", None, "missing.jsonl.*no such file"),
        ("no/*.jsonl", None, r"no/\*\.jsonl.*no file matches"),
        ("a.jsonl", b"", "a.jsonl: the file is empty"),
        ("a.txt", b"", "a.txt: the file is empty"),
        ("a.jsonl", b"\n \n", "a.jsonl: none of its first 1,000 lines is a JSON object"),
        ("a.jsonl", b'{"body": "x"}\n', 'a.jsonl: no text field "text" or "content".*found: body'),
        ("a.parquet", b"PAR1 not really", "a.parquet: cannot be read as parquet"),
        (
            "a.jsonl.gz",
            b"\x1f\x8b\0",
            r"a.jsonl.gz: cannot be decoded: .*set data.skip_corrupt_blocks",
        ),
        ("a.dat", b"\0\1", r"a.dat: unsupported suffix .dat; supported"),
        ("a.jsonl", b'{"text": "x"}\n', "1 documents are too few for 2 lanes; set data.lanes = 1"),
    ],
)
def test_data_that_cannot_be_trained_on_is_refused(
    open_files, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        open_files(name)


def test_the_largest_number_of_lanes_that_works_is_named(open_files, tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [{"text": "x"}] * 5)
    with pytest.raises(DataError, match=r"5 documents are too few for 6 lanes; set data.lanes = 4"):
        open_files("a.jsonl", lanes=6)
    open_files("a.jsonl", lanes=4)


def test_columns_are_checked_in_every_file(open_files, tmp_path: Path) -> None:
    for i, column in enumerate(("text", "body")):
        pyarrow.parquet.write_table(pyarrow.table({column: ["x"] * 4}), tmp_path / f"{i}.parquet")
    with pytest.raises(DataError, match=r'1.parquet: no column "text"; found: body'):
        open_files("*.parquet")
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), tmp_path / "n.parquet")
    with pytest.raises(DataError, match=r"n.parquet: no text field"):
        open_files("n.parquet")


def test_a_directory_that_is_empty_or_mixed_is_refused(open_files, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no file that can be read"):
        open_files(".")
    (tmp_path / "a.txt").write_text("x")
    write_lines(tmp_path / "b.jsonl", [{"text": "x"}])
    with pytest.raises(DataError, match=r"b.jsonl is jsonl: give each format a source of its own"):
        open_files(".")


def test_settings_of_sources_are_checked(open_files, folder: Path) -> None:
    for weight in (-1.0, float("nan"), 0.0):
        with pytest.raises(RecipeError, match="weight"):
            open_files("a.jsonl", weight=weight, base=folder)


def test_the_chosen_field_is_said_and_other_text_files_are_taken(
    open_files, folder: Path, tmp_path: Path
) -> None:
    catalog, _ = open_files("p/*.parquet", base=folder)
    assert catalog.notes == ['source "web": the text is field "content"']
    for i in range(3):
        (tmp_path / f"{i}.py").write_text("x = 1\n" * i)
    catalog, _ = open_files("*.py")
    assert [file.name for file in catalog.sources[0].files] == ["1.py", "2.py"]
    assert catalog.notes == ['source "web": 1 empty files hold no document']


# ------------------------------------------------------------------------------------ records


@given(st.lists(st.sampled_from([b"{}", b"", b" \t", b"x" * 30, b"a\rb", b"\0"]), max_size=20), st.booleans())
def test_any_cut_of_a_file_holds_every_line_once(tmp_path_factory, lines: list[bytes], newline: bool) -> None:
    path = tmp_path_factory.mktemp("cut") / "a.jsonl"
    content = b"\n".join(lines) + b"\n" * newline
    path.write_bytes(content)
    expected: list[int] = []
    start = 0
    for line in content.split(b"\n"):
        expected += [start] if line.strip() else []
        start += len(line) + 1
    reader = JsonLines([path], "text")
    starts, stops = reader.documents(0)
    assert starts.tolist() == expected
    for start, stop in zip(starts.tolist(), stops.tolist(), strict=True):
        ((position, line),) = reader.read(0, start, stop)
        assert position == start
        assert line == content[start:stop]
    for size in (1, 3, 7, 1000):
        cut = zip(*(bounds.tolist() for bounds in reader.ranges(0, size)), strict=True)
        found = [position for bounds in cut for position, _ in reader.read(0, *bounds)]
        assert found == expected


@pytest.mark.parametrize("row_group_size", [1, 4, 100])
def test_parquet_ranges_hold_every_row_once(tmp_path: Path, row_group_size: int) -> None:
    path = tmp_path / "a.parquet"
    rows = [str(i) * 50 for i in range(23)]
    pyarrow.parquet.write_table(pyarrow.table({"text": rows}), path, row_group_size=row_group_size)
    reader = Parquet([path], "text")
    for cut in (reader.documents(0), reader.ranges(0, 120), reader.ranges(0, 10**6)):
        read = [r for a, b in zip(*cut, strict=True) for r in reader.read(0, int(a), int(b))]
        assert [position for position, _ in read] == list(range(23))
        assert [reader.decode(content) for _, content in read] == rows


def test_parquet_row_groups_are_cached_within_a_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": ["x" * 1000] * 40})
    pyarrow.parquet.write_table(table, path, row_group_size=4)
    monkeypatch.setattr(tables, "CACHED_BYTES", 10_000)
    reader = Parquet([path], "text")
    for row in range(40):
        reader.read(0, row, row + 1)
        held = [column.nbytes for column in reader._groups.values()]
        assert sum(held) == reader._cached_bytes < 15_000
    assert len(held) > 1


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"text": "cut off', "not valid JSON"),
        (b"not json", "not valid JSON"),
        (b"[1]", "not a JSON object"),
        (b"{}", 'no field "text"'),
        (b'{"text": null}', 'field "text" is null'),
        (b'{"text": 12}', 'field "text" is no string'),
        (b'{"text": ""}', "empty text"),
        (b'{"text": "\xff\xfe"}', "invalid UTF-8"),
        (b'{"text": "\\ud800"}', "not valid JSON"),
    ],
)
def test_bad_lines_are_told_apart(line: bytes, reason: str) -> None:
    found = JsonLines([], "text").decode(line + b"\n")
    assert isinstance(found, Bad)
    assert found.reason.startswith(reason)


def test_bad_rows_and_files_are_told_apart() -> None:
    assert Parquet([], "text").decode(None) == Bad("no text: null")
    assert PlainText([], "").decode(b"\xff") == Bad("invalid UTF-8 at byte 0")


@pytest.mark.parametrize("world", [1, 3])
def test_each_bad_record_is_named_once_an_epoch_with_its_place(open_data, folder: Path, world: int) -> None:
    catalog, plan = open_data()
    ranks = [Loader(catalog, plan, rank, world, 1, prefetch=False) for rank in range(world)]
    skips = []
    while (parts := [rank.next_step() for rank in ranks]) and min(part.epoch for part in parts) < 2:
        skips += [skip for part in parts for skip in part.skips]
    first = sorted(s for s in skips if s.epoch == 0)
    lines = [(s.place, s.reason[:8]) for s in first if s.source == "s0"]
    assert sorted(lines) == [("line 31", "no field"), ("line 6", "not vali"), ("line 61", "empty te")]
    assert {s.file for s in first if s.source == "s0"} == {str(folder / "a.jsonl")}
    rows = [(s.document_id, s.place) for s in first if s.source == "s1"]
    assert rows == [(f"{f}.parquet:{row}", f"row {row}") for f in range(2) for row in (30, 31)]
    second = sorted(s._replace(epoch=0) for s in skips if s.epoch == 1)
    assert second == first


def test_a_source_without_text_is_an_error_that_names_it(open_files, tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [{"text": ""}] * 9)
    catalog, plan = open_files("a.jsonl", text="text")
    with pytest.raises(DataError, match=r'source "web": lane 0 read as many .* line \d: empty text'):
        Loader(catalog, plan, 0, 1, 1, prefetch=False).next_step()


def test_a_lane_that_meets_only_bad_records_goes_on_to_its_next_epoch(open_files, tmp_path: Path) -> None:
    write_lines(tmp_path / "a.jsonl", [{"text": "good"}] * 4 + [{"text": ""}] * 2)
    catalog, plan = open_files("a.jsonl", lanes=6)  # a document for each lane and epoch
    got = Loader(catalog, plan, 0, 1, 1, prefetch=False).next_step()
    assert {skip.document_id for skip in got.skips if skip.epoch == 0} == {"a.jsonl:68", "a.jsonl:81"}
    assert all(row.segments[0].length > 0 for row in got.rows)


def test_too_many_bad_records_stop_the_run(open_data) -> None:
    catalog, _ = open_data()
    check_skipped(catalog, np.array([[999, 900, 0], [5000, 5, 0]]), 0.001)
    with pytest.raises(DataError, match='source "s1": 6 of 5000 records'):
        check_skipped(catalog, np.array([[999, 900, 0], [5000, 6, 9]]), 0.001)


# -------------------------------------------------------------------------------- fingerprint


def test_the_fingerprint_knows_what_matters_and_not_where_it_lies(open_files, tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    write_lines(tmp_path / "one" / "a.jsonl", [{"text": "abc"}] * 8)
    old = fingerprint(*open_files("one/*.jsonl"))
    assert json.loads(json.dumps(old)) == old
    (tmp_path / "one").rename(tmp_path / "two")
    assert fingerprint_difference(old, fingerprint(*open_files("two/*.jsonl"))) is None
    other = fingerprint_difference(old, fingerprint(*open_files("two/*.jsonl", lanes=4)))
    assert other == "lanes: 2 when the run began, 4 now"
    with (tmp_path / "two" / "a.jsonl").open("a") as file:
        file.write('{"text": "more"}\n')
    changed = fingerprint_difference(old, fingerprint(*open_files("two/*.jsonl")))
    assert changed == "sources[web].files[a.jsonl].size: 128 when the run began, 145 now"
    write_lines(tmp_path / "two" / "b.jsonl", [{"text": "abc"}])
    write_lines(tmp_path / "two" / "a.jsonl", [{"text": "abc"}] * 8)
    added = fingerprint_difference(old, fingerprint(*open_files("two/*.jsonl")))
    assert added is not None
    assert added.startswith("sources[web].files[1]: absent when the run began")
