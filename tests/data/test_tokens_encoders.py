"""The libraries that encode, and tokenizers that are no tokenizer.json."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from flame.data import tokens
from flame.data.catalog import fingerprint, open_catalog
from flame.data.config import BACKENDS, DataConfig, SourceConfig, TokenizerConfig
from flame.data.encoders import Tokenizers, adversarial_texts, check_equal
from flame.data.loader import Loader
from flame.data.plan import DataPlan
from flame.data.tokens import check_backend, load_tokenizer
from flame.errors import DataError, RecipeError

FAST = [name for name in BACKENDS if name != "tokenizers"]
TEXTS = st.lists(st.text(max_size=100), max_size=6)


@pytest.mark.parametrize("backend", FAST)
def test_a_faster_library_gives_the_ids_of_the_reference(folder: Path, backend: str) -> None:
    check_backend(folder / "tok", backend, ["own text", "a <|eos|> b"])


@pytest.mark.parametrize("backend", FAST)
@settings(deadline=None, max_examples=60)
@given(texts=TEXTS)
def test_a_faster_library_agrees_on_any_text(folder: Path, backend: str, texts: list[str]) -> None:
    fast, reference = load_tokenizer(folder / "tok", False, backend), load_tokenizer(folder / "tok", False)
    for ids, expected in zip(fast.encode(texts), reference.encode(texts), strict=True):
        assert ids.dtype == expected.dtype == np.int32
        assert ids.tolist() == expected.tolist()
    assert fast.identity() == reference.identity()


@pytest.mark.parametrize("backend", BACKENDS)
def test_text_that_spells_a_special_token_stays_text_in_every_library(folder: Path, backend: str) -> None:
    tokenizer = load_tokenizer(folder / "tok", False, backend)
    (ids,) = tokenizer.encode(["a <|eos|> b<|eos|>"])
    assert ids.tolist().count(tokenizer.eos_id) == 1
    assert tokenizer.decode(ids) == "a <|eos|> b<|eos|>"


class Wrong(Tokenizers):
    """Gives another id for one text."""

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, ends = super().encode(texts)
        at = list(texts).index("rare") if "rare" in texts else -1
        return (ids + (np.arange(len(ids)) == ends[at] - 1) * (at >= 0)).astype(np.int32), ends


def test_a_library_with_other_ids_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inner = tokenizers.Tokenizer.from_file(str(folder / "tok" / "tokenizer.json"))
    right = Tokenizers(inner)
    check_equal("fastokens", Wrong(inner), right, ["a", "b"], "here")
    with pytest.raises(RecipeError, match=r"other ids than .* here: 'rare' becomes"):
        check_equal("fastokens", Wrong(inner), right, ["a", "rare", "b"], "here")
    # through the catalog, which compares the recipe's own documents too
    (tmp_path / "a.jsonl").write_text('{"text": "common"}\n{"text": "rare"}\n')
    config = DataConfig(sources=[SourceConfig("a", ["a.jsonl"])], sequence_length=8)
    plan = DataPlan.of(config, 8, 0)
    settings = TokenizerConfig(str(folder / "tok"), backend="fastokens")
    open_catalog(config, settings, plan, tmp_path)
    made = tokens.make_encoder
    monkeypatch.setattr(tokens, "make_encoder", lambda b, i: made(b, i) if b == "tokenizers" else Wrong(i))
    with pytest.raises(RecipeError, match=r"the recipe's own text: 'rare' becomes"):
        open_catalog(config, settings, plan, tmp_path)


def test_the_fixed_texts_are_always_the_same_and_hold_what_they_should() -> None:
    texts = list(adversarial_texts(["<|eos|>"]))
    assert texts == list(adversarial_texts(["<|eos|>"]))
    whole = "".join(texts)
    assert all(piece in whole for piece in ("<|eos|><|eos|>", "\r\n", "  ", "\0", "\ufeff", "東京", "\u0301"))
    whole.encode()


@pytest.mark.parametrize("backend", FAST)
def test_rows_and_fingerprint_do_not_depend_on_the_library(folder: Path, backend: str) -> None:
    config = DataConfig(sources=[SourceConfig("a", ["a.jsonl"])], sequence_length=64, lanes=2)
    plan = DataPlan.of(config, 256, 3)
    ask = [TokenizerConfig("tok"), TokenizerConfig("tok", backend=backend)]
    plain, fast = (open_catalog(config, settings, plan, folder) for settings in ask)
    assert fingerprint(plain, plan) == fingerprint(fast, plan)
    loaders = [Loader(catalog, plan, 0, 1, 4, prefetch=False) for catalog in (plain, fast)]
    for _ in range(12):
        one, other = (loader.next_step() for loader in loaders)
        assert one.counts == other.counts
        assert (one.state == other.state).all()


# ------------------------------------------------------------------------- without tokenizer.json


@given(TEXTS)
def test_bytes_are_the_bytes_of_the_text_and_eos(texts: list[str]) -> None:
    tokenizer = load_tokenizer("bytes", bos=False)
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (257, 256)
    for text, ids in zip(texts, tokenizer.encode(texts), strict=True):
        assert ids.tolist() == [*text.encode(), 256]
        assert tokenizer.decode(ids) == text


def test_what_bytes_cannot_do_is_refused() -> None:
    with pytest.raises(RecipeError, match="no BOS"):
        load_tokenizer("bytes", bos=True)
    with pytest.raises(RecipeError, match=r"needs a tokenizer\.json"):
        load_tokenizer("bytes", bos=False, backend="gigatoken")


def write_ranks(path: Path) -> Path:
    """The 256 bytes and two merges."""
    ranks = [bytes([i]) for i in range(256)] + [b"ab", b"abab"]
    lines = [f"{base64.b64encode(token).decode()} {rank}" for rank, token in enumerate(ranks)]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_tiktoken_ranks_need_a_pattern_and_an_end(tmp_path: Path) -> None:
    ranks = write_ranks(tmp_path / "mine.tiktoken")
    with pytest.raises(DataError, match=r"mine\.json"):
        load_tokenizer(ranks, bos=False)
    (tmp_path / "mine.json").write_text(json.dumps({"pattern": r"\w+|\W+", "special_tokens": {}}))
    with pytest.raises(DataError, match="no EOS"):
        load_tokenizer(ranks, bos=False)
    special = {"<|endoftext|>": 258, "<s>": 259}
    (tmp_path / "mine.json").write_text(json.dumps({"pattern": r"\w+|\W+", "special_tokens": special}))
    tokenizer = load_tokenizer(ranks, bos=True)
    assert tokenizer.vocab_size == 260
    (ids,) = tokenizer.encode(["ababab é<|endoftext|>"])
    assert ids.tolist() == [259, 257, 256, *" é<|endoftext|>".encode(), 258]
    assert tokenizer.decode(ids) == "ababab é<|endoftext|>"
    (tmp_path / "mine.tiktoken").write_text("no ranks\n")
    with pytest.raises(DataError, match="cannot be read as tiktoken ranks"):
        load_tokenizer(ranks, bos=False)


def test_the_names_of_tiktokens_own_files_are_known(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(write_ranks(tmp_path / "cl100k_base.tiktoken"), bos=False)
    (ids,) = tokenizer.encode(["ab 1234\n"])
    assert ids.tolist() == [256, *b" 1234\n", 100257]
