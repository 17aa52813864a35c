"""Texts made of several fields, and conversations, in every format alike; masks on their way to the batch."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from data.chats import CHATML, said, write_tokenizer
from data.streaming import Opened, loaders, plain, replayed, rows_of, some_runs
from hypothesis import given, settings

from flame.batch import IGNORED
from flame.data import tables
from flame.data.catalog import fingerprint, open_catalog, open_sources
from flame.data.config import DataConfig, SourceConfig, TokenizerConfig
from flame.data.formats import Bad, text_of
from flame.data.plan import DataPlan
from flame.data.sample import sample_texts
from flame.data.sources import open_source
from flame.data.template import Template
from flame.errors import DataError, RecipeError

RECORDS: list[dict[str, Any]] = [
    {
        "title": f"t{i} {{}}",
        "meta": {"body": f"naïve {i}", "n": i},
        "messages": said(f"q{i} <|im_end|>", "a " * i),
    }
    for i in range(1, 30)
]
RECORDS[3]["title"] = None
RECORDS[7]["meta"] = {"body": None, "n": 1}
RECORDS[9]["messages"] = None
RECORDS[11]["messages"] = []


def write_all(directory: Path, records: list[dict[str, Any]]) -> list[str]:
    """The records in every format; the files' names."""
    datasets = pytest.importorskip("datasets")
    directory.mkdir(exist_ok=True)
    (directory / "r.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    table = pyarrow.Table.from_pylist(records)
    pyarrow.parquet.write_table(table, directory / "r.parquet", row_group_size=7)
    with pyarrow.ipc.new_file(str(directory / "r.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=5)
    datasets.Dataset.from_list(records).save_to_disk(directory / "saved")
    return ["r.jsonl", "r.parquet", "r.arrow", "saved"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("records")
    write_all(root, RECORDS)
    return root


def texts_of(config: SourceConfig, base: Path, shape: Any) -> list[Any]:
    source = open_source(config, base, 1, shape=shape)
    reader, cut = source.open(), source.blocks
    found: list[Any] = []
    for file, start, stop in zip(cut.file.tolist(), cut.start.tolist(), cut.stop.tolist(), strict=True):
        found += [text_of(reader, content) for _, content in reader.read(file, start, stop)]
    return found


FILES = ("r.jsonl", "r.parquet", "r.arrow", "saved")


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_a_template_joins_fields_alike_in_every_format(
    made: Path, name: str, large: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tables, "LARGE_GROUP", 0 if large else 2**24)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    written = "{{{title}}}\n\n{meta.body}."
    shape = Template.parse(written, "s")
    found = texts_of(SourceConfig("s", [name], template=written), made, shape)
    for i, (record, text) in enumerate(zip(RECORDS, found, strict=True)):
        if i == 3:
            assert text == Bad('field "title" is null')
        elif i == 7:
            assert isinstance(text, Bad) and "meta.body" in text.reason
        else:
            assert text == f"{{{record['title']}}}\n\n{record['meta']['body']}."


@pytest.mark.parametrize(
    "written", ["", "no field", "{}", "{a!r}", "{a:>3}", "{a[0]}", "{a.}", "{.a}", "{a", "a}"]
)
def test_templates_that_are_none_are_refused(written: str) -> None:
    with pytest.raises(RecipeError, match=r'source "s": template'):
        Template.parse(written, "s")


@pytest.mark.parametrize("name", FILES)
def test_fields_are_looked_for_before_the_first_step(made: Path, name: str) -> None:
    for written, reason in (
        ("{titel}", 'no field "titel"; did you mean title'),
        ("{meta.boody}", '"meta.boody" is absent'),
        ("{meta.n}", '"meta.n" is of type int64, expected text'),
    ):
        if name == "r.jsonl" and "." in written:  # a line of JSON has no columns
            continue
        shape = Template.parse(written, "s")
        with pytest.raises(DataError, match=reason.replace(".", r"\.")):
            open_source(SourceConfig("s", [name], template=written), made, 1, shape=shape)


def test_values_that_are_no_text_are_bad_records(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"a": "x"}\n{"a": 3}\n{}\n[1]\n{"a": ""}\nno\n')
    found = texts_of(SourceConfig("s", ["x.jsonl"]), tmp_path, Template.parse("{a}", "s"))
    reasons = [text.reason if isinstance(text, Bad) else text for text in found]
    assert reasons[:5] == ["x", 'field "a" is no string', 'no field "a"', "not a JSON object", "empty text"]
    assert reasons[5].startswith("not valid JSON")
    column = pyarrow.array([b"ok", b"\xff", None], pyarrow.binary()).cast(pyarrow.binary())
    pyarrow.parquet.write_table(pyarrow.table({"a": column, "b": ["1", "2", "3"]}), tmp_path / "x.parquet")
    found = texts_of(SourceConfig("s", ["x.parquet"]), tmp_path, Template.parse("{b}{a}", "s"))
    assert found[0] == "1ok"
    assert found[1].reason.startswith("invalid UTF-8")
    assert found[2] == Bad('field "a" is null')


def test_text_files_have_no_fields(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("x")
    with pytest.raises(DataError, match="text, which has no fields"):
        open_source(SourceConfig("s", ["x.txt"]), tmp_path, 1, shape=Template.parse("{a}", "s"))


# ------------------------------------------------------------------------- conversations as rows


@pytest.fixture(scope="module")
def opened(made: Path, folder: Path) -> Callable[..., Opened]:
    write_tokenizer(folder / "tok", made / "tok", CHATML)
    known: dict[str, Opened] = {}

    def open_it(name: str = "r.jsonl", data: dict[str, Any] | None = None, **source: Any) -> Opened:
        key = repr((name, source, data))
        if key not in known:
            asked = {"chat": "messages", **source}
            config = DataConfig(
                [SourceConfig("s", [name], **asked)],
                **{"sequence_length": 32, "lanes": 3, "window_steps": 4, **(data or {})},
            )
            plan = DataPlan.of(config, 6 * config.sequence_length, 5)
            known[key] = open_catalog(config, TokenizerConfig("tok"), plan, made), plan
        return known[key]

    return open_it


@pytest.mark.parametrize("name", FILES[1:])
def test_conversations_are_the_same_in_every_format(opened: Callable[..., Opened], name: str) -> None:
    (theirs,), (ours,) = loaders(opened(name), 1), loaders(opened(), 1)
    for _ in range(5):
        for a, b in zip(theirs.next_step().rows, ours.next_step().rows, strict=True):
            assert a.tokens.tolist() == b.tokens.tolist()
            assert a.trained is not None and b.trained is not None
            assert a.trained.tolist() == b.trained.tolist()


def test_labels_are_the_assistants_words_alone_however_they_are_cut(opened: Callable[..., Opened]) -> None:
    catalog, _ = data = opened()
    tokenizer, source = catalog.load_tokenizer(), catalog.sources[0]
    reader = source.open()
    signed: dict[str, np.ndarray] = {}
    for position, content in [r for b in range(len(source.blocks)) for r in block(reader, source, b)]:
        text = text_of(reader, content)
        if isinstance(text, str):
            signed[f"{source.files[0].name}:{position}"], _ = tokenizer.encode_parts([text], [True], [True])
    (loader,) = loaders(data, 1)
    cut = 0
    for _ in range(20):
        got = loader.next_step()
        labels = np.concatenate([batch.labels.numpy() for batch in got.micro_batches])
        for row, of_row in zip(got.rows, labels, strict=True):
            expected: list[int] = []
            for segment in row.segments:
                tokens = signed[segment.document_id][segment.offset : segment.offset + segment.length]
                expected += [*(int(t) if t >= 0 else IGNORED for t in tokens[1:]), IGNORED]
            assert of_row.tolist() == expected
            assert (row.tokens >= 0).all()
        assert got.counts.predicted == int((labels != IGNORED).sum())
        cut += got.counts.cut
    assert cut


def block(reader: Any, source: Any, number: int) -> list[Any]:
    cut = source.blocks
    return reader.read(int(cut.file[number]), int(cut.start[number]), int(cut.stop[number]))


@settings(max_examples=20, deadline=None)
@given(runs=some_runs(2, 6, 7))
def test_masks_survive_restarts_anywhere_on_any_ranks(
    opened: Callable[..., Opened], runs: list[tuple[int, int, int]]
) -> None:
    data = opened()
    got = [masked_rows(parts) for parts in replayed(data, runs)]
    (loader,) = loaders(data, 1)
    assert got == [masked_rows([loader.next_step()]) for _ in got]


def masked_rows(parts: list[Any]) -> list[Any]:
    rows = rows_of(parts)
    return [(a, row.trained.tobytes()) for a, row in zip(plain(rows), rows, strict=True)]


def test_another_mask_is_another_digest_and_another_fingerprint(opened: Callable[..., Opened]) -> None:
    one, other = opened(), opened(train_on="all")
    steps = [loaders(data, 1)[0].next_step() for data in (one, other)]
    assert [row.tokens.tolist() for row in steps[0].rows] == [row.tokens.tolist() for row in steps[1].rows]
    assert steps[0].counts.digest != steps[1].counts.digest
    assert steps[0].counts.predicted < steps[1].counts.predicted
    assert fingerprint(*one) != fingerprint(*other)


def test_a_tokenizer_is_trained_on_what_messages_say(made: Path) -> None:
    config = DataConfig([SourceConfig("s", ["r.jsonl"], chat="messages")], 32)
    sources = open_sources(config, DataPlan.of(config, 32, 0), made)
    assert "q1 <|im_end|>\n\na " in set(sample_texts(sources, 10**6))
