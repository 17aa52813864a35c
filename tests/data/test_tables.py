"""Tables whose parts are large or broken."""

from __future__ import annotations

from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from flame.data import tables
from flame.data.cache import Access
from flame.data.files import as_files
from flame.data.formats import Bad
from flame.data.tables import Parquet
from flame.errors import DataError

ROWS: list[str | None] = [None if i % 11 == 5 else f"{i} " + "word " * (i % 29) for i in range(300)]


def read_all(reader: Parquet, block_bytes: int = 300) -> list[tuple[int, object]]:
    cut = zip(*(bounds.tolist() for bounds in reader.ranges(0, block_bytes)), strict=True)
    return [record for bounds in cut for record in reader.read(0, *bounds)]


def test_a_large_row_group_is_decoded_once_per_node_and_kept_in_small_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": ROWS}), tmp_path / "a.parquet", row_group_size=200)
    access = Access(str(tmp_path / "cache"))
    expected = read_all(Parquet([tmp_path / "a.parquet"], "text", access))
    assert [content and content.decode() for _, content in expected] == ROWS
    assert not (tmp_path / "cache").exists()
    decoded: list[int] = []
    decode = Parquet._decode
    monkeypatch.setattr(Parquet, "_decode", lambda self, f, g: decoded.append(g) or decode(self, f, g))
    monkeypatch.setattr(tables, "LARGE_GROUP", 1000)
    monkeypatch.setattr(tables, "CACHED_BATCH", 100)
    for _ in range(3):  # as so many ranks
        assert read_all(Parquet([tmp_path / "a.parquet"], "text", access)) == expected
    assert decoded == [0, 1]
    assert len(list((tmp_path / "cache").iterdir())) == 2


def damaged(path: Path) -> None:
    """A parquet file of three row groups whose second is overwritten."""
    pyarrow.parquet.write_table(pyarrow.table({"text": ROWS}), path, row_group_size=100, compression="zstd")
    group = pyarrow.parquet.ParquetFile(path).metadata.row_group(1).column(0)
    content = bytearray(path.read_bytes())
    start = group.data_page_offset
    content[start : start + 200] = b"\xff" * 200
    path.write_bytes(content)


@pytest.mark.parametrize("large", [1000, 10**9])
def test_an_undecodable_row_group_stops_the_run_or_its_rows_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: int
) -> None:
    monkeypatch.setattr(tables, "LARGE_GROUP", large)
    damaged(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a.parquet: row group 1: cannot be decoded.*skip_corrupt_blocks"):
        read_all(Parquet([tmp_path / "a.parquet"], "text", Access(str(tmp_path / "c"))))
    found = read_all(
        Parquet([tmp_path / "a.parquet"], "text", Access(str(tmp_path / "c"), skip_corrupt=True))
    )
    assert [row for row, content in found if isinstance(content, Bad)] == list(range(100, 200))
    whole = [content for _, content in found if not isinstance(content, Bad)]
    assert [content and content.decode() for content in whole] == ROWS[:100] + ROWS[200:]


def test_a_parquet_file_that_shrinks_is_a_failed_read_that_never_skips(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": ROWS}), path, row_group_size=100)
    reader = Parquet(as_files([path]), "text", Access(str(tmp_path / "c"), skip_corrupt=True))
    reader.read(0, 0, 1)
    with path.open("r+b") as file:
        file.truncate(500)
    with pytest.raises(DataError, match=r"a.parquet: ends after 500 bytes.*put the file back"):
        reader.read(0, 250, 251)
