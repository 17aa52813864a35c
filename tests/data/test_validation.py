"""The split: which documents are held out, that training never sees them, and their rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data.conftest import texts
from data.id_files import write_ids
from data.streaming import loaders, plain, replayed, rows_of, state_after
from hypothesis import given
from hypothesis import strategies as st

from flame.batch import Row
from flame.data import blocks, validation
from flame.data.catalog import Catalog, fingerprint, fingerprint_difference, open_catalog
from flame.data.config import DataConfig, SourceConfig, TokenizerConfig
from flame.data.plan import DataPlan
from flame.data.split import content_key, is_held_out
from flame.data.tokens import load_tokenizer
from flame.errors import DataError, RecipeError

FRACTION = 0.2
Opened = tuple[Catalog, DataPlan]


def validation_rows(catalog: Catalog, plan: DataPlan, tokens: int | None = None) -> Iterator[Row]:
    """What `flame data preview --split validation` shows."""
    return validation.rows_of(*validation.validation_data(catalog, plan, tokens))


def opened(
    folder: Path, *sources: SourceConfig, fraction: float = FRACTION, seed: int = 7, **settings: Any
) -> Opened:
    wanted: dict[str, Any] = {"sequence_length": 64, "lanes": 3, "window_steps": 4, **settings}
    config = DataConfig(list(sources), **wanted)
    plan = DataPlan.of(config, 6 * 64, seed, fraction)
    return open_catalog(config, TokenizerConfig("tok"), plan, folder), plan


@pytest.fixture(params=[False, True])
def cut_in_ranges(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        monkeypatch.setattr(blocks, "INDEX_BELOW", 0)
        monkeypatch.setattr(blocks, "SMALLEST", 256)


def documents(rows: Any) -> dict[tuple[str, str], list[int]]:
    """The tokens of each document, put together: by source and document, in its last epoch."""
    pieces: dict[tuple[str, str, int], dict[int, list[int]]] = {}
    for row in rows:
        at = 0
        for segment in row.segments:
            piece = row.tokens[at : at + segment.length].tolist()
            held = pieces.setdefault((segment.source, segment.document_id, segment.epoch), {})
            assert held.setdefault(segment.offset, piece) == piece
            at += segment.length
    return {
        (source, name): [i for _, piece in sorted(pieces[source, name, epoch].items()) for i in piece]
        for source, name, epoch in sorted(pieces, key=lambda key: key[2])
    }


WRITTEN = texts(31, 120)
HELD = {text for text in WRITTEN if is_held_out(text, FRACTION)}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 documents in two files, some of them twice, and a bad record."""
    root = tmp_path_factory.mktemp("split")
    lines = [json.dumps({"text": text}) for text in WRITTEN]
    (root / "a.jsonl").write_text("\n".join([*lines[:70], "bad"]))
    (root / "b.jsonl").write_text("\n".join(lines[60:]))
    return root


@given(st.text(max_size=50))
def test_the_hash_is_pinned_and_even(text: str) -> None:
    assert content_key("flame") == 0x140390454D26F083
    assert is_held_out(text, 0.999999999999)
    assert not is_held_out(text, 0.0)


def test_the_share_held_out_is_the_fraction() -> None:
    held = sum(is_held_out(str(i), 0.01) for i in range(50_000))
    assert 400 < held < 600


def test_training_and_validation_share_no_text_and_leave_none_out(
    written: Path, folder: Path, cut_in_ranges: None
) -> None:
    data = opened(folder, SourceConfig("s", [f"{written}/*.jsonl"], max_epochs=2))
    trained = documents(row for parts in replayed(data, [(1, 300, 0)]) for row in rows_of(parts))
    held_out = documents(validation_rows(*data))
    decode = data[0].load_tokenizer().decode
    assert {decode(tokens) for tokens in held_out.values()} == HELD
    assert {decode(tokens) for tokens in trained.values()} == set(WRITTEN) - HELD
    assert len(held_out) == sum(text in HELD for text in [*WRITTEN[:70], *WRITTEN[60:]])  # copies with it


def test_what_is_held_out_is_counted_and_resumed(written: Path, folder: Path, cut_in_ranges: None) -> None:
    data = opened(folder, SourceConfig("s", [f"{written}/*.jsonl"], max_epochs=1))
    whole = [plain(rows_of(parts)) for parts in replayed(data, [(1, 60, 0)])]
    assert [
        plain(rows_of(p)) for p in replayed(data, [(2, 3, 3), (5, 6, 1), (3, 21, 0), (1, 30, 2)])
    ] == whole
    state, total = None, np.zeros((1, 4), dtype=np.int64)
    for world, steps in ((1, 2), (2, 7), (3, 60)):
        ranks = loaders(data, world, state)
        for _ in range(steps):
            parts = [rank.next_step() for rank in ranks]
            total += sum(part.records for part in parts)
        state = state_after(data, parts, ranks[0].columns)
    held = sum(text in HELD for text in [*WRITTEN[:70], *WRITTEN[60:]])
    assert total[:, :3].tolist() == [[131, 1, held]]
    assert int(state.lanes[:, state.columns.index("s.held_out")].sum()) == held


def test_validation_rows_are_the_same_for_any_seed_lanes_ranks_and_place(
    written: Path, folder: Path, tmp_path: Path, cut_in_ranges: None
) -> None:
    config = SourceConfig("s", [f"{written}/*.jsonl"])
    data = opened(folder, config)
    first = plain(list(validation_rows(*data)))
    assert [row[0] for row in first] == list(range(len(first)))
    assert plain(list(validation_rows(*opened(folder, config, seed=99, lanes=2)))) == first
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_bytes((written / name).read_bytes())
    assert plain(list(validation_rows(*opened(folder, SourceConfig("s", [f"{tmp_path}/*.jsonl"]))))) == first
    assert all(len(row.tokens) == 64 for row in validation_rows(*data))


def test_the_first_tokens_are_taken_in_file_order_and_packed_once(
    written: Path, folder: Path, cut_in_ranges: None
) -> None:
    data = opened(folder, SourceConfig("s", [f"{written}/*.jsonl"]))
    whole = documents(validation_rows(*data))
    in_order = sorted(whole, key=lambda key: (key[1].split(":")[0], int(key[1].split(":")[1].split("#")[0])))
    for tokens in (300, 64, 10, 450):
        rows = list(validation_rows(*data, tokens=tokens))
        assert sum(int(row.lengths.sum()) for row in rows) == tokens
        assert [int(row.lengths.sum()) for row in rows[:-1]] == [64] * (len(rows) - 1)
        taken = documents(rows)
        first = in_order[: len(taken)]
        assert sorted(taken) == sorted(first)
        assert all(taken[key] == whole[key] for key in first[:-1])
        assert taken[first[-1]] == whole[first[-1]][: len(taken[first[-1]])]


def test_a_set_larger_than_a_window_is_packed_in_several(
    written: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = opened(folder, SourceConfig("s", [f"{written}/*.jsonl"]))
    whole = documents(validation_rows(*data))
    monkeypatch.setattr("flame.data.validation.WINDOW_TOKENS", 4 * 64)
    rows = list(validation_rows(*data))
    assert [row.index for row in rows] == list(range(len(rows)))
    assert documents(rows) == whole
    short = list(validation_rows(*data, tokens=450))
    assert sum(int(row.lengths.sum()) for row in short) == 450
    assert plain(short[:4]) == plain(rows[:4])


def test_the_split_knows_no_names_order_or_source(written: Path, folder: Path, tmp_path: Path) -> None:
    lines = (written / "a.jsonl").read_text().splitlines() + (written / "b.jsonl").read_text().splitlines()
    (tmp_path / "z.jsonl").write_text("\n".join(reversed(lines)))
    data = opened(folder, SourceConfig("other", [f"{tmp_path}/z.jsonl"]))
    decode = data[0].load_tokenizer().decode
    assert {decode(tokens) for tokens in documents(validation_rows(*data)).values()} == HELD


@pytest.mark.parametrize("name", ["t.parquet", "t.npy", "m.bin"])
def test_ids_are_split_alike_with_and_without_eos(folder: Path, tmp_path: Path, name: str) -> None:
    whole = [tokens.tolist() for tokens in load_tokenizer(folder / "tok", False).encode(WRITTEN)]
    write_ids(tmp_path, whole)
    data = opened(folder, SourceConfig("s", [f"{tmp_path}/{name}"], ids=True))
    held_out = sorted(documents(validation_rows(*data)).values())
    assert held_out == sorted(t for t in whole if is_held_out(np.array(t[:-1]), FRACTION))


def test_validation_files_are_never_trained_and_in_the_fingerprint(written: Path, folder: Path) -> None:
    settings: dict[str, Any] = {"fraction": 0.0}
    by_file = SourceConfig("s", [f"{written}/*.jsonl"], validation=[f"{written}/b.jsonl"], max_epochs=1)
    beside = SourceConfig("t", [f"{written}/a.jsonl"])
    data = opened(folder, by_file, beside, **settings)
    trained = documents(row for parts in replayed(data, [(1, 200, 0)]) for row in rows_of(parts))
    held_out = documents(validation_rows(*data))
    assert {name.partition(":")[0] for source, name in trained if source == "s"} == {"a.jsonl"}
    assert {(source, name.partition(":")[0]) for source, name in held_out} == {("s", "b.jsonl")}
    decode = data[0].load_tokenizer().decode
    assert sorted(decode(tokens) for tokens in held_out.values()) == sorted(WRITTEN[60:])
    other = opened(folder, SourceConfig("s", [f"{written}/a.jsonl"], max_epochs=1), beside, **settings)
    difference = fingerprint_difference(fingerprint(*data), fingerprint(*other))
    assert difference is not None
    assert "validation" in difference
    half = opened(folder, beside, fraction=0.5)
    difference = fingerprint_difference(fingerprint(*half), fingerprint(*opened(folder, beside)))
    assert difference == "validation_fraction: 0.5 when the run began, 0.2 now"


@pytest.mark.parametrize(
    ("config", "fraction", "error", "message"),
    [
        ({}, 1.0, RecipeError, "validation.fraction: found 1.0, expected a share from 0 to below 1"),
        ({}, -0.1, RecipeError, "validation.fraction: found -0.1"),
        ({"validation": ["b.jsonl"]}, 0.1, RecipeError, "give one of the two"),
        ({"validation": ["*.jsonl"]}, 0.0, DataError, "validation names all of its files"),
        ({"validation": ["no.jsonl"]}, 0.0, DataError, r"no\.jsonl.*no such file"),
        ({}, 0.0, RecipeError, "nothing is held out for validation"),
        ({}, 1e-9, DataError, "no document is held out of s; raise validation.fraction = 1e-09"),
    ],
)
def test_a_split_that_cannot_be_is_refused(
    written: Path, folder: Path, config: dict[str, Any], fraction: float, error: type[Exception], message: str
) -> None:
    config = {name: [f"{written}/{file}" for file in files] for name, files in config.items()}
    with pytest.raises(error, match=message):
        list(
            validation_rows(
                *opened(folder, SourceConfig("s", [f"{written}/*.jsonl"], **config), fraction=fraction)
            )
        )


def test_a_source_that_is_held_out_whole_is_an_error_that_says_so(folder: Path, tmp_path: Path) -> None:
    held = next(iter(HELD))
    (tmp_path / "a.jsonl").write_text("\n".join([json.dumps({"text": held})] * 9))
    (loader,) = loaders(opened(folder, SourceConfig("s", [f"{tmp_path}/a.jsonl"])), 1)
    with pytest.raises(DataError, match=r'"s".*none to train on; all are held out: lower '):
        loader.next_step()


def test_preview_and_check_know_what_is_held_out(
    write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from flame import cli

    recipe = str(write_recipe(replaced={"[batch]": "[validation]\nfraction = 0.3\ntokens = 640\n[batch]"}))

    def said(*arguments: str) -> str:
        assert cli.run(["data", *arguments]) == 0
        return capsys.readouterr().out

    lines = said("preview", recipe, "--split", "validation", "--steps", "0:3", "--json", "--ranks", "2")
    rows = [row for line in lines.splitlines() for row in json.loads(line)["rows"]]
    assert len(rows) == 10  # of 64 tokens
    assert "step 0" in said("preview", recipe, "--split", "validation")
    trained = said("preview", recipe, "--steps", "0:99", "--json")
    assert not {s[2] for row in rows for s in row} & {
        s[2] for line in trained.splitlines() for row in json.loads(line)["rows"] for s in row
    }
    (source,) = json.loads(said("check", recipe, "--json", "--processes", "1"))["sources"]
    assert source["held_out"] > 5
    assert source["documents"] + source["held_out"] + source["bad"] == source["records"]
    assert "held out for validation" in said("check", recipe, "--processes", "1")
    assert cli.run(["data", "preview", str(write_recipe("plain")), "--split", "validation"]) == 1
    assert "nothing is held out" in capsys.readouterr().err
