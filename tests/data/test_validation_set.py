"""The validation set in memory: what it counts, how ranks share it, and sources of its own."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from data.conftest import texts
from data.streaming import plain
from hypothesis import given
from hypothesis import strategies as st

from flame.batch import IGNORED
from flame.data.catalog import Catalog, open_catalog
from flame.data.config import DataConfig, SourceConfig, TokenizerConfig, ValidationConfig
from flame.data.plan import DataPlan
from flame.data.token_bytes import token_bytes
from flame.data.tokens import load_tokenizer
from flame.data.validation import open_validation, overlaps, rows_of
from flame.data.validation_set import PREDICTED, TEXT_BYTES, TOKENS, ValidationSet, read_validation_set
from flame.errors import DataError, RecipeError

LENGTH = 64


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.jsonl, and two files to validate on, one of them with a bad record."""
    root = tmp_path_factory.mktemp("sets")
    for name, seed, count in (("train", 41, 60), ("web", 42, 25), ("code", 43, 9)):
        lines = [json.dumps({"text": text}) for text in texts(seed, count)]
        (root / f"{name}.jsonl").write_text("\n".join(lines) + "\n" + ("bad\n" if name == "web" else ""))
    return root


def opened(folder: Path, root: Path, held: ValidationConfig, tokenizer: str = "tok") -> tuple[Any, ...]:
    config = DataConfig([SourceConfig("s", [f"{root}/train.jsonl"])], LENGTH, lanes=3)
    plan = DataPlan.of(config, 6 * LENGTH, 7, held.fraction)
    tokens = TokenizerConfig(tokenizer)
    catalog = open_catalog(config, tokens, plan, folder)
    return catalog, *open_validation(held, config, tokens, catalog, plan, folder)


def two_sources(root: Path, tokens: int = 10**6) -> ValidationConfig:
    named = [
        SourceConfig(name, [f"{root}/{name}.jsonl"], weight=w) for name, w in (("web", 3.0), ("code", 1.0))
    ]
    return ValidationConfig(sources=named, tokens=tokens)


@pytest.fixture(scope="module")
def whole(folder: Path, written: Path) -> ValidationSet:
    _, *data = opened(folder, written, two_sources(written))
    return read_validation_set(*data)


def test_sources_of_its_own_are_read_once_and_counted(
    folder: Path, written: Path, whole: ValidationSet
) -> None:
    assert whole.sources == ("web", "code")
    assert whole.records_skipped == 1
    tokenizer = load_tokenizer(folder / "tok", bos=False)
    for number, (seed, count) in enumerate(((42, 25), (43, 9))):
        tokens = sum(map(len, tokenizer.encode(texts(seed, count))))
        assert whole.counts[number, :2].tolist() == [tokens, count]
    # each segment's first token is predicted by nothing
    segments = sum(len(row.lengths) for row in whole.rows)
    assert whole.counts[:, PREDICTED].sum() == whole.counts[:, TOKENS].sum() - segments


def test_bytes_are_those_of_the_predicted_tokens_text(folder: Path, written: Path) -> None:
    """With a tokenizer that makes a token of a byte: all bytes but the first of each segment."""
    config = ValidationConfig(sources=[SourceConfig("web", [f"{written}/web.jsonl"])])
    tokenizer = TokenizerConfig("bytes")
    data = DataConfig([SourceConfig("s", [f"{written}/train.jsonl"])], LENGTH, lanes=3)
    plan = DataPlan.of(data, 6 * LENGTH, 7)
    catalog = open_catalog(data, tokenizer, plan, folder)
    found = read_validation_set(*open_validation(config, data, tokenizer, catalog, plan, folder))
    ends = sum(int(row.tokens[end - 1] == 256) for row in found.rows for end in np.cumsum(row.lengths))
    alone = sum(
        int(row.tokens[end - n] == 256)
        for row in found.rows
        for end, n in zip(np.cumsum(row.lengths), row.lengths, strict=True)
    )
    segments = sum(len(row.lengths) for row in found.rows)
    text = sum(len(text.encode()) for text in texts(42, 25))
    assert ends == 25
    assert found.counts[0].tolist() == [text + 25, 25, text + 25 - segments, text - (segments - alone)]


@given(st.text(max_size=60))
def test_the_bytes_of_a_documents_tokens_are_its_text(folder: Path, text: str) -> None:
    for path in (folder / "tok", "bytes"):
        tokenizer = load_tokenizer(path, bos=False)
        assert token_bytes(tokenizer)[tokenizer.encode([text])[0]].sum() == len(text.encode())


def test_bytes_of_a_tokenizer_that_marks_spaces_and_falls_back_to_bytes() -> None:
    from tokenizers import decoders, models, pre_tokenizers

    from flame.data.token_bytes import _fill_huggingface

    vocabulary = {
        "<unk>": 0,
        "\u2581": 1,
        "\u2581a": 2,
        "a": 3,
        "b": 4,
        "\u2581ab": 5,
        "</s>": 6,
        "<0xE6>": 7,
    }
    inner: Any = tokenizers.Tokenizer(
        models.BPE(vocabulary, [("a", "b")] if "ab" in vocabulary else [], byte_fallback=True)
    )
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    inner.add_special_tokens(["</s>"])
    sizes = np.zeros(8, dtype=np.int64)
    _fill_huggingface(sizes, inner)
    assert sizes[1:].tolist() == [1, 2, 1, 1, 3, 0, 1]


def test_tiktokens_bytes_are_its_own() -> None:
    tiktoken = pytest.importorskip("tiktoken")
    from flame.data.encoders import Tiktoken

    ranks = {bytes([i]): i for i in range(256)} | {b"ab": 256, "é".encode(): 257}
    encoder = Tiktoken(
        tiktoken.Encoding("t", pat_str=".+", mergeable_ranks=ranks, special_tokens={"<|e|>": 259})
    )
    assert dict(encoder.text_bytes()) == dict.fromkeys(range(256), 1) | {256: 2, 257: 2}


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("size", [1, 3])
def test_ranks_share_the_rows_with_as_many_passes_each(whole: ValidationSet, ranks: int, size: int) -> None:
    shares = [pickle.loads(pickle.dumps(whole)).share(rank, ranks, size) for rank in range(ranks)]
    given = [list(share.batches()) for share in shares]
    assert len({len(parts) for parts in given}) == 1
    numbers = [number for parts in given for part in parts for number in part.rows if number >= 0]
    assert sorted(numbers) == list(range(whole.total_rows))
    counts = np.zeros(2, dtype=np.int64)
    for part in (part for parts in given for part in parts):
        assert part.batch.tokens.shape == part.sources.shape == (size, LENGTH)
        predicted = part.batch.labels.numpy() != IGNORED
        assert not predicted[part.sources < 0].any()
        counts += [int((predicted & (part.sources == source)).sum()) for source in range(2)]
        for number, tokens in zip(part.rows, part.batch.tokens.numpy(), strict=True):
            assert number < 0 or (tokens == whole.rows[number].tokens).all()
    assert counts.tolist() == whole.counts[:, PREDICTED].tolist()


def test_the_set_is_the_same_in_file_order_whatever_the_seed(folder: Path, written: Path) -> None:
    _, *data = opened(folder, written, two_sources(written, 500))
    found = read_validation_set(*data)
    assert found.counts[:, TOKENS].sum() == 500
    assert abs(found.counts[0, TOKENS] - 375) <= LENGTH  # three of four by weight
    assert [row[1] for row in plain(list(rows_of(*data)))] == [row.tokens.tobytes() for row in found.rows]
    assert (found.counts[:, TEXT_BYTES] > 0).all()


def test_a_source_that_is_also_trained_is_said(folder: Path, written: Path, tmp_path: Path) -> None:
    def notes(*files: Path) -> list[str]:
        config = ValidationConfig(sources=[SourceConfig("v", [str(file) for file in files])])
        catalogs: list[Catalog] = list(opened(folder, written, config))
        return overlaps(*catalogs[:2])

    assert notes(written / "web.jsonl") == []
    (note,) = notes(written / "web.jsonl", written / "train.jsonl")
    assert 'train.jsonl is also trained, by source "s"' in note
    (tmp_path / "copy.jsonl").write_bytes((written / "train.jsonl").read_bytes())
    assert "copy.jsonl is also trained" in notes(tmp_path / "copy.jsonl")[0]


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"max_epochs": 2}, RecipeError, "validation.sources.*max_epochs.*leave it out"),
        ({"validation": ["x.jsonl"]}, RecipeError, "validation.sources.*validation: each"),
        ({"files": ["no.jsonl"]}, DataError, "no such file"),
    ],
)
def test_sources_that_cannot_be_validated_on_are_refused(
    folder: Path, written: Path, changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    source = SourceConfig(**{"name": "v", "files": [f"{written}/web.jsonl"], **changed})
    with pytest.raises(error, match=message):
        opened(folder, written, ValidationConfig(sources=[source]))


def test_sources_without_any_text_are_an_error_that_names_them(
    folder: Path, written: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": ""}\n' * 9)
    _, *data = opened(
        folder, written, ValidationConfig(sources=[SourceConfig("v", [f"{tmp_path}/bad.jsonl"])])
    )
    with pytest.raises(DataError, match="no document is held out of v; look at the validation files"):
        read_validation_set(*data)
