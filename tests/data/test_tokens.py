from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from flame.data import tokens
from flame.data.tokens import load_tokenizer, split_text, train_tokenizer
from flame.errors import DataError, RecipeError


@given(st.text(max_size=200))
def test_documents_end_by_id_and_decode_to_their_text(folder: Path, text: str) -> None:
    tokenizer = load_tokenizer(folder / "tok", bos=False)
    (ids,) = tokenizer.encode([text])
    assert ids[-1] == tokenizer.eos_id
    assert tokenizer.decode(ids) == text


def test_text_that_spells_a_special_token_stays_text(folder: Path) -> None:
    tokenizer = load_tokenizer(folder / "tok" / "tokenizer.json", bos=False)
    (ids,) = tokenizer.encode(["a <|eos|> b"])
    assert ids.tolist().count(tokenizer.eos_id) == 1
    assert ids.max() < tokenizer.vocab_size <= 400


def test_parts_begin_and_end_a_document_once(folder: Path, tmp_path: Path) -> None:
    raw = json.loads((folder / "tok" / "tokenizer.json").read_text())
    raw["added_tokens"].append({**raw["added_tokens"][0], "id": 400, "content": "<|bos|>"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    tokenizer = load_tokenizer(tmp_path, bos=True)
    assert tokenizer.vocab_size == 401
    ids, stops = tokenizer.encode_parts(["a", "b", "c"], [True, False, False], [False, False, True])
    first, middle, last = np.split(ids, stops[:-1])
    assert first[0] == tokenizer.bos_id == 400
    assert last[-1] == tokenizer.eos_id
    assert len(middle) == 1


@given(st.text(alphabet="a \né🔥", max_size=300))
def test_long_text_is_split_between_characters_and_nothing_lost(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "PART_BYTES", 16)
        parts = list(split_text(text))
    assert "".join(parts) == text
    assert all(len(part.encode()) <= 16 for part in parts)


def test_a_trained_tokenizer_loads_in_transformers(folder: Path) -> None:
    theirs = AutoTokenizer.from_pretrained(folder / "tok")
    ours = load_tokenizer(folder / "tok", bos=False)
    assert theirs.eos_token_id == ours.eos_id
    assert theirs("each rank 東京").input_ids == ours.encode(["each rank 東京"])[0].tolist()[:-1]


def test_a_vocabulary_below_the_bytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="more than 256"):
        train_tokenizer(["text"], 256, tmp_path)


def test_tokenizers_that_cannot_be_used_say_why(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file"):
        load_tokenizer(tmp_path, bos=False)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="cannot be read as a tokenizer"):
        load_tokenizer(tmp_path, bos=False)
    raw = json.loads((folder / "tok" / "tokenizer.json").read_text())
    raw["added_tokens"] = []
    del raw["model"]["vocab"]["<|eos|>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(DataError, match="no EOS token"):
        load_tokenizer(tmp_path, bos=False)
    with pytest.raises(DataError, match="no BOS token"):
        load_tokenizer(folder / "tok", bos=True)
