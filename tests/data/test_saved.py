"""Arrow files and data sets, as `datasets` and pyarrow write them."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pytest

from flame.data.config import SourceConfig
from flame.data.saved import ArrowTable
from flame.data.sources import list_files, open_source
from flame.errors import DataError, RecipeError

datasets = pytest.importorskip("datasets")
ROWS: list[str | None] = [None if i % 11 == 5 else f"{i} " + "word " * (i % 29) for i in range(300)]


@pytest.mark.parametrize("layout", ["new_file", "new_stream"])
def test_any_cut_of_an_arrow_file_holds_every_row_once(tmp_path: Path, layout: str) -> None:
    table = pyarrow.table({"text": ROWS})
    with getattr(pyarrow.ipc, layout)(tmp_path / "a.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=70)
    reader = ArrowTable([tmp_path / "a.arrow"], "text")
    assert ArrowTable.fields(tmp_path / "a.arrow") == ["text"]
    for cut in (reader.documents(0), reader.ranges(0, 900), reader.ranges(0, 10**9)):
        pairs = zip(*(bounds.tolist() for bounds in cut), strict=True)
        found = [record for bounds in pairs for record in reader.read(0, *bounds)]
        assert [row for row, _ in found] == list(range(300))
        assert [text and text.decode() for _, text in found] == ROWS
    content = (tmp_path / "a.arrow").read_bytes()
    (tmp_path / "a.arrow").write_bytes(content[:-50])
    with pytest.raises(DataError, match=r"a.arrow: ends after .* put the file back"):
        reader.read(0, 0, 1)
    with pytest.raises(DataError, match=r"a.arrow: (truncated|cannot be read as Arrow)"):
        ArrowTable([tmp_path / "a.arrow"], "text").documents(0)


def test_a_saved_data_set_is_its_shards_and_a_split_is_named(tmp_path: Path) -> None:
    made = datasets.Dataset.from_dict({"text": ROWS})
    made.save_to_disk(tmp_path / "one", num_shards=2, num_proc=None)
    source = open_source(SourceConfig("s", ["one"]), tmp_path, 2)
    assert [file.name for file in source.files] == ["data-00000-of-00002.arrow", "data-00001-of-00002.arrow"]
    reader = source.open()
    texts = [reader.read(f, 0, 150)[i][1] for f in range(2) for i in range(150)]
    assert [text and text.decode() for text in texts] == ROWS
    datasets.DatasetDict({"train": made, "test": made}).save_to_disk(tmp_path / "both")
    with pytest.raises(DataError, match=r"choose one by split = .*: train, test"):
        list_files(SourceConfig("s", ["both"]), tmp_path)
    found = list_files(SourceConfig("s", ["both"], split="test"), tmp_path)
    assert [path for _, path in found] == [tmp_path / "both" / "test" / "data-00000-of-00001.arrow"]


def test_a_data_set_is_loaded_by_name_and_split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "set").mkdir()
    lines = [json.dumps({"text": text or "none"}) for text in ROWS]
    (tmp_path / "set" / "train.jsonl").write_text("\n".join(lines))
    source = open_source(SourceConfig("s", dataset="set", split="train"), tmp_path, 2)
    assert source.format == "arrow"
    assert [content for _, content in source.open().read(0, 0, 2)] == [b"0 ", b"1 word "]
    with pytest.raises(DataError, match=r'dataset = "set": cannot be loaded'):
        open_source(SourceConfig("s", dataset="set", split="absent"), tmp_path, 2)
    with pytest.raises(DataError, match="one whole split"):
        open_source(SourceConfig("s", dataset="set", split="train[:5]"), tmp_path, 2)
    for config in (SourceConfig("s"), SourceConfig("s", ["a.jsonl"], dataset="set")):
        with pytest.raises(RecipeError, match="files or dataset"):
            open_source(config, tmp_path, 2)
