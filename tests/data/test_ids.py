"""Token ids made already: each format, any cut, the rows that the text itself gives, and what is refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from data.conftest import texts
from data.id_files import MEGATRON, write_ids, write_megatron
from data.streaming import plain, replayed, rows_of
from hypothesis import given
from hypothesis import strategies as st

from flame.data import blocks, ids, tables
from flame.data.cache import Access, Vocabulary
from flame.data.catalog import fingerprint, fingerprint_difference, open_catalog
from flame.data.config import DataConfig, SourceConfig, TokenizerConfig
from flame.data.formats import Bad, Format
from flame.data.id_tables import ArrowIds, ParquetIds
from flame.data.ids import FlatBin, Megatron, Npy
from flame.data.plan import DataPlan
from flame.data.sources import open_source
from flame.data.tokens import load_tokenizer
from flame.errors import DataError, RecipeError

EOS, SIZE = 2, 50
ACCESS = Access(vocabulary=Vocabulary(SIZE, EOS, None))
DOCUMENTS = st.lists(st.lists(st.integers(3, 49), max_size=9), min_size=1, max_size=12)


def held(reader: Format, cut: tuple[np.ndarray, np.ndarray]) -> list[tuple[int, Any]]:
    pairs = zip(*(bounds.tolist() for bounds in cut), strict=True)
    found = [record for start, stop in pairs for record in reader.read(0, start, stop)]
    return [(at, c.astype(int).tolist() if isinstance(c, np.ndarray) else c) for at, c in found]


@given(DOCUMENTS, st.booleans(), st.sampled_from(ids.FLAT_DTYPES), st.integers(1, 40))
def test_any_cut_of_flat_ids_holds_every_document_once(
    tmp_path_factory: pytest.TempPathFactory, documents: list[list[int]], last: bool, dtype: str, size: int
) -> None:
    flat, expected = list[int](), list[tuple[int, list[int]]]()
    for document in documents:
        if document:
            expected.append((len(flat), document))
        flat += [*document, EOS]
    if not last:
        flat.pop()
    base = tmp_path_factory.getbasetemp()
    np.array(flat, dtype=dtype).tofile(base / "f.bin")
    np.save(base / "f.npy", np.array(flat, dtype=dtype))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ids, "SCANNED", 64)
        for reader in [FlatBin([base / "f.bin"], dtype, ACCESS), Npy([base / "f.npy"], "", ACCESS)][
            : len(flat)
        ]:
            assert held(reader, reader.documents(0)) == expected
            assert held(reader, reader.ranges(0, 4 * size)) == expected
            assert reader.decoded_bytes(0) == 4 * len(flat)


@given(
    st.lists(st.lists(st.lists(st.integers(3, 49), max_size=5), max_size=3), max_size=9), st.integers(1, 60)
)
@pytest.mark.parametrize("dtype", MEGATRON)
def test_any_cut_of_megatrons_files_holds_every_document_once(
    tmp_path_factory: pytest.TempPathFactory, dtype: str, documents: list[list[list[int]]], size: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "m.bin"
    write_megatron(path, documents, dtype)
    if not path.stat().st_size:
        return  # an empty file is refused before
    reader = Megatron([path], "", ACCESS)
    whole = [[i for sequence in document for i in sequence] for document in documents]
    expected = [(n, document or Bad("no token ids")) for n, document in enumerate(whole)]
    assert held(reader, reader.documents(0)) == held(reader, reader.ranges(0, size)) == expected


def test_megatrons_sequences_may_lie_anywhere(tmp_path: Path) -> None:
    write_megatron(tmp_path / "m.bin", [[[3, 4], [5]], [[6, 7, 2]]], "int32")
    index = bytearray((tmp_path / "m.idx").read_bytes())
    index[34 + 12 : 34 + 12 + 24] = struct.pack(
        "<3q", 16, 0, 4
    )  # first sequence at 16, second at 0, third at 4
    (tmp_path / "m.idx").write_bytes(index)
    reader = Megatron([tmp_path / "m.bin"], "", ACCESS)
    assert held(reader, reader.documents(0)) == [(0, [7, 2, 3]), (1, [4, 5, 6])]


@pytest.mark.parametrize("kind", ["list", "large_list", "fixed"])
@pytest.mark.parametrize("large", [False, True])
def test_any_cut_of_a_column_of_lists_holds_every_row_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, large: bool
) -> None:
    rows: list[Any] = [None if i % 7 == 3 else [3 + i % 40] * 4 for i in range(90)]
    rows[5], rows[20] = [4, None, 5, 6], [4, -1, 5, 6]
    rows[21], rows[22] = [4, 50, 5, 6], [7, 7, 7, EOS]
    types = {
        "list": pyarrow.list_(pyarrow.int32()),
        "large_list": pyarrow.large_list(pyarrow.uint16()),
        "fixed": pyarrow.list_(pyarrow.int64(), 4),
    }
    if kind == "large_list":
        rows[20] = [4, 60000, 5, 6]
    table = pyarrow.table({"text": ["x"] * 90, "input_ids": pyarrow.array(rows, types[kind])})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=40)
    with pyarrow.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=33)
    monkeypatch.setattr(tables, "LARGE_GROUP", 0 if large else 2**30)
    access = Access(str(tmp_path / "cache"), vocabulary=ACCESS.vocabulary)
    for reader in (
        ParquetIds([tmp_path / "a.parquet"], "input_ids", access),
        ArrowIds([tmp_path / "a.arrow"], "input_ids", access),
    ):
        assert type(reader).fields(tmp_path / ("a." + type(reader).__name__[:-3].lower())) == ["input_ids"]
        for cut in (reader.documents(0), reader.ranges(0, 100), reader.ranges(0, 2**30)):
            found = held(reader, cut)
            assert [row for row, _ in found] == list(range(90))
            assert found[0][1] == [3, 3, 3, 3]
            assert found[22][1] == [7, 7, 7]
            assert found[3][1] is None
            assert reader.decode(None) == Bad("no token ids: null")
            assert found[5][1] == Bad("a token id is null")
            outside = 60000 if kind == "large_list" else -1
            assert found[20][1] == Bad(f"token id {outside} is outside the tokenizer's vocabulary of 50")
            assert found[21][1] == Bad("token id 50 is outside the tokenizer's vocabulary of 50")
        assert reader.decoded_bytes(0) > 0


@pytest.mark.parametrize("dtype", [pyarrow.int64(), pyarrow.uint16()])
def test_an_id_counts_as_four_bytes_however_it_is_stored(tmp_path: Path, dtype: Any) -> None:
    table = pyarrow.table({"input_ids": pyarrow.array([[7] * 500] * 100, pyarrow.list_(dtype))})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table)
    assert ParquetIds([tmp_path / "a.parquet"], "input_ids", ACCESS).decoded_bytes(0) == 4 * 50_000
    assert ArrowIds([tmp_path / "a.arrow"], "input_ids", ACCESS).decoded_bytes(0) == 4 * 50_000


def test_what_a_document_of_ids_is() -> None:
    both = Vocabulary(SIZE, EOS, 1)
    core = ids.checked(np.array([1, 9, EOS, 9, EOS], dtype=np.uint16), both)
    assert isinstance(core, np.ndarray)
    assert core.tolist() == [9, EOS, 9]
    assert ids.with_ends(core, True, True, both).tolist() == [1, 9, EOS, 9, EOS]
    assert ids.with_ends(core, False, True, both).tolist() == [9, EOS, 9, EOS]
    assert ids.with_ends(core, True, False, Vocabulary(SIZE, EOS, None)).tolist() == [9, EOS, 9]
    assert ids.checked(np.array([EOS]), both) == Bad("no token id but EOS")
    assert ids.checked(np.array([3.5]), both) == Bad("a token id is no whole number")
    assert ids.checked(np.array([np.nan]), both) == Bad("a token id is no whole number")


# ---------------------------------------------------------------------------------- whole sources


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, folder: Path) -> Path:
    """The same documents as text and as ids of each format."""
    root = tmp_path_factory.mktemp("ids")
    written = texts(8, 70)
    (root / "t.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in written))
    whole = [tokens.tolist() for tokens in load_tokenizer(folder / "tok", False).encode(written)]
    write_ids(root, whole)
    return root


NAMES = ["t.jsonl", "t.parquet", "t.arrow", "t.npy", "flat.bin", "m.bin", "m.idx"]


def source_of(name: str, base: Path, label: str = "s", **settings: Any) -> SourceConfig:
    dtype = "uint16" if name == "flat.bin" else None
    return SourceConfig(label, [f"{base}/{name}"], ids=name != "t.jsonl", ids_dtype=dtype, **settings)


def opened(folder: Path, *sources: SourceConfig, bos: bool = False, **settings: Any) -> Any:
    config = DataConfig(list(sources), sequence_length=64, lanes=3, window_steps=4, **settings)
    plan = DataPlan.of(config, 6 * 64, 7)
    return open_catalog(config, TokenizerConfig("tok", bos=bos), plan, folder), plan


@pytest.mark.parametrize("name", NAMES[1:])
@pytest.mark.parametrize("bos", [False, True])
def test_ids_give_the_rows_of_the_text_they_came_from(
    made: Path, folder: Path, tmp_path: Path, name: str, bos: bool
) -> None:
    if bos:  # this tokenizer, with a BOS to put before documents
        whole = json.loads((folder / "tok" / "tokenizer.json").read_text())
        config = json.loads((folder / "tok" / "tokenizer_config.json").read_text())
        (tmp_path / "tok").mkdir()
        (tmp_path / "tok" / "tokenizer.json").write_text(json.dumps(whole))
        named = config | {"bos_token": "!"}
        (tmp_path / "tok" / "tokenizer_config.json").write_text(json.dumps(named))
        folder = tmp_path
    expected, found = (
        [
            (row.tokens.tolist(), [(s.epoch, s.offset, s.length) for s in row.segments])
            for parts in replayed(opened(folder, source_of(which, made), bos=bos), [(1, 30, 0)])
            for row in rows_of(parts)
        ]
        for which in ("t.jsonl", name)
    )
    assert found == expected


@pytest.mark.parametrize("ranges", [False, True])
def test_text_and_ids_are_mixed_and_resumed_on_any_ranks(
    made: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, ranges: bool
) -> None:
    if ranges:
        monkeypatch.setattr(blocks, "INDEX_BELOW", 0)
        monkeypatch.setattr(blocks, "SMALLEST", 256)
    monkeypatch.setattr(ids, "PART_IDS", 100)
    data = opened(
        folder, source_of("t.jsonl", made, "a"), source_of("m.bin", made, "b"), source_of("t.npy", made, "c")
    )
    whole = [plain(rows_of(parts)) for parts in replayed(data, [(1, 40, 0)])]
    assert [
        plain(rows_of(p)) for p in replayed(data, [(2, 5, 3), (5, 9, 1), (3, 14, 0), (1, 12, 2)])
    ] == whole
    segments = [segment for rows in whole for _, _, row in rows for segment in row]
    assert {segment[0] for segment in segments} == {"a", "b", "c"}
    assert any("#" in str(segment[2]) for segment in segments if segment[0] != "a")


def test_every_document_of_an_epoch_is_tiled_once_also_in_parts(
    made: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ids, "PART_IDS", 100)
    data = opened(folder, source_of("flat.bin", made, max_epochs=1))
    got: dict[str, list[tuple[int, list[int]]]] = {}
    for parts in replayed(data, [(1, 200, 0)]):
        for row in rows_of(parts):
            at = 0
            for segment in row.segments:
                piece = row.tokens[at : at + segment.length].tolist()
                got.setdefault(segment.document_id, []).append((segment.offset, piece))
                at += segment.length
    order = sorted(got, key=lambda name: [int(part) for part in name.partition(":")[2].split("#")])
    tokens = [i for name in order for _, piece in sorted(got[name]) for i in piece]
    flat = np.fromfile(made / "flat.bin", dtype="<u2").tolist()
    assert tokens == [*flat, data[0].sources[0].access.vocabulary.eos]


def test_the_fingerprint_knows_the_index_and_not_the_place(made: Path, folder: Path, tmp_path: Path) -> None:
    for name in ("m.bin", "m.idx"):
        (tmp_path / name).write_bytes((made / name).read_bytes())
    before = fingerprint(*opened(folder, source_of("m.bin", made)))
    assert fingerprint_difference(before, fingerprint(*opened(folder, source_of("m.bin", tmp_path)))) is None
    content = bytearray((tmp_path / "m.idx").read_bytes())
    content[-16:-8] = content[-24:-16]  # one document more or less at the end
    (tmp_path / "m.idx").write_bytes(content)
    after = fingerprint(*opened(folder, source_of("m.bin", tmp_path)))
    assert "m.bin" in str(fingerprint_difference(before, after))


# ---------------------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("spoil", "name", "message"),
    [
        (
            lambda r: (r / "m.idx").unlink(),
            "m.bin",
            r'no m.idx beside it.*ids_dtype = "uint16" for one of nanoGPT',
        ),
        (
            lambda r: (r / "m.bin").write_bytes(b"\0" * 40),
            "m.bin",
            r"m.bin: truncated: 40 bytes, and its index",
        ),
        (
            lambda r: (r / "m.idx").write_bytes(b"MMIDIDX\0\0" * 9),
            "m.bin",
            "cannot be read as Megatron's index",
        ),
        (lambda r: (r / "m.idx").write_bytes(b"MM"), "m.bin", "cannot be read as Megatron's index"),
        (
            lambda r: (r / "flat.bin").write_bytes(b"abc"),
            "flat.bin",
            "3 bytes are no whole number of uint16 ids",
        ),
        (lambda r: (r / "flat.idx").write_bytes(b"x"), "flat.bin", "could be either"),
        (lambda r: np.save(r / "t.npy", np.zeros((3, 4), "i4")), "t.npy", r"int32 of shape \(3, 4\)"),
        (lambda r: np.save(r / "t.npy", np.zeros(9)), "t.npy", "holds float64"),
        (lambda r: (r / "t.npy").write_bytes((r / "t.npy").read_bytes()[:-1]), "t.npy", "truncated"),
        (lambda r: (r / "t.npy").write_bytes(b"no array"), "t.npy", "cannot be read as .npy"),
        (lambda r: (r / "flat.bin").write_bytes(b""), "flat.bin", "the file is empty"),
        (
            lambda r: (r / "t.jsonl").rename(r / "x.jsonl"),
            "x.jsonl",
            "ids = true, and its suffix says something else",
        ),
    ],
)
def test_files_of_ids_that_cannot_be_trained_on_are_refused(
    made: Path, folder: Path, tmp_path: Path, spoil: Callable[[Path], Any], name: str, message: str
) -> None:
    for file in made.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    spoil(tmp_path)
    with pytest.raises(DataError, match=message):
        opened(folder, source_of(name, tmp_path))


def test_settings_of_ids_are_checked(made: Path, folder: Path) -> None:
    with pytest.raises(RecipeError, match="set ids = true"):
        opened(folder, SourceConfig("s", [f"{made}/t.jsonl"], ids_column="x"))
    with pytest.raises(RecipeError, match="ids_column names their column"):
        opened(folder, SourceConfig("s", [f"{made}/t.parquet"], "tokens", ids=True))
    with pytest.raises(DataError, match=r'no column of ids "x"; found: tokens; set ids_column'):
        opened(folder, SourceConfig("s", [f"{made}/t.parquet"], ids=True, ids_column="x"))
    with pytest.raises(DataError, match="ids = true reads token ids"):
        opened(folder, SourceConfig("s", [f"{made}/t.npy"]))
    with pytest.raises(DataError, match="give each format a source of its own"):
        opened(folder, SourceConfig("s", [f"{made}/t.npy", f"{made}/t.parquet"], ids=True))
    large = Access(vocabulary=Vocabulary(200_000, 100_257, None))
    with pytest.raises(DataError, match=r"uint16 holds ids up to 65535.*EOS.*is 100257"):
        open_source(source_of("flat.bin", made), folder, 1, large)


def test_ids_outside_the_vocabulary_are_bad_records_with_their_place(
    made: Path, folder: Path, tmp_path: Path
) -> None:
    flat = np.fromfile(made / "flat.bin", dtype="<u2")
    flat[5] = 999
    flat.tofile(tmp_path / "flat.bin")
    data = opened(folder, source_of("flat.bin", tmp_path))
    skips = {skip for parts in replayed(data, [(1, 60, 0)]) for skip in parts[0].skips if skip.epoch == 0}
    assert [(s.document_id, s.place) for s in skips] == [("flat.bin:0", "token 0")]
    assert {s.reason for s in skips} == {"token id 999 is outside the tokenizer's vocabulary of 400"}


@pytest.mark.parametrize("name", ["t.npy", "m.bin", "flat.bin"])
def test_a_file_of_ids_that_shrinks_is_a_failed_read(
    made: Path, folder: Path, tmp_path: Path, name: str
) -> None:
    for file in made.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    source = opened(folder, source_of(name, tmp_path))[0].sources[0]
    reader, last = source.open(), len(source.blocks) - 1
    where = int(source.blocks.start[last]), int(source.blocks.stop[last])
    reader.read(0, *where)
    with (tmp_path / name).open("r+b") as file:
        file.truncate(100)
    with pytest.raises(DataError, match="put the file back"):
        reader.read(0, *where)
