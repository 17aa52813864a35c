"""Tokenizers: text to token ids in batches, and a new byte-level BPE from one's own text."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from flame.errors import DataError, RecipeError

PART_BYTES = 2**20  # longer text is tokenized in parts: some tokenizers are quadratic in it
FILE_NAME = "tokenizer.json"
EOS = "<|eos|>"  # of tokenizers trained here
USUAL_EOS = (EOS, "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>")
USUAL_BOS = ("<|bos|>", "<|begin_of_text|>", "<s>", "<bos>", "<|startoftext|>")
PROBE = "Flame reads text: naïve café, 東京 🔥\n\tdef f(x): return x[0] + 1,234.5  <|eos|></s>"


class Encoder(Protocol):
    """What the data plane asks of a tokenizer."""

    def encode_parts(self, parts: Sequence[tuple[str, bool, bool]]) -> list[np.ndarray]:
        """The ids of (text, begins a document, ends a document): int32 [tokens] each."""
        ...


class Tokenizer:
    """A `tokenizers` tokenizer that ends (and, where asked, begins) each document by id.

    Text that spells a special token stays text.
    """

    def __init__(self, path: Path, bos: bool) -> None:
        """`path`: a tokenizer.json or a directory that holds one. Raises DataError."""
        self.file = path / FILE_NAME if path.is_dir() else path
        self._inner = _load(self.file)
        self._inner.encode_special_tokens = True
        self._inner.no_padding()
        self._inner.no_truncation()
        self.vocab_size = max(self._inner.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        self.eos_id = _special_id(self._inner, self.file, "eos", USUAL_EOS)
        self.bos_id = _special_id(self._inner, self.file, "bos", USUAL_BOS) if bos else None

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Each whole text's ids with EOS (and BOS): int32 [tokens]."""
        return self.encode_parts([(text, True, True) for text in texts])

    def encode_parts(self, parts: Sequence[tuple[str, bool, bool]]) -> list[np.ndarray]:
        """The ids of (text, begins a document, ends a document): int32 [tokens] each."""
        encodings = self._inner.encode_batch_fast([text for text, _, _ in parts], add_special_tokens=False)
        found: list[np.ndarray] = []
        for encoding, (_, begins, ends) in zip(encodings, parts, strict=True):
            ids = encoding.ids
            if ends:
                ids.append(self.eos_id)
            if begins and self.bos_id is not None:
                ids.insert(0, self.bos_id)
            found.append(np.frombuffer(array("i", ids), dtype=np.int32))
        return found

    def count_alone(self, parts: Sequence[tuple[str, bool, bool]]) -> int:
        """The tokens of these parts by the library alone, nothing made of them: to measure against."""
        encodings = self._inner.encode_batch_fast([text for text, _, _ in parts], add_special_tokens=False)
        return sum(map(len, encodings))

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`, special tokens left out."""
        return self._inner.decode([int(i) for i in ids], skip_special_tokens=True)

    def identity(self) -> dict[str, Any]:
        """What the fingerprint holds of it: the file's hash, the ids added, the ids of a fixed text."""
        return {
            "file_hash": hashlib.blake2b(self.file.read_bytes(), digest_size=16).hexdigest(),
            "eos": self.eos_id,
            "bos": self.bos_id,
            "probe": [int(i) for i in self.encode([PROBE])[0]],
        }


def load_tokenizer(path: str | Path, bos: bool) -> Tokenizer:
    """The tokenizer at `path`: a tokenizer.json or a directory that holds one. Raises DataError."""
    return Tokenizer(Path(path), bos)


def _load(file: Path) -> tokenizers.Tokenizer:
    if not file.is_file():
        raise DataError(
            f"tokenizer.path: {file}: no such file; name a tokenizer.json or a directory that holds one"
        )
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception for whatever is wrong in the file
        raise DataError(f"tokenizer.path: {file}: cannot be read as a tokenizer: {error}") from None


def _special_id(inner: tokenizers.Tokenizer, file: Path, kind: str, usual: tuple[str, ...]) -> int:
    """The id of the EOS or BOS token: as the files beside tokenizer.json name it, else by a usual name."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        token = _named_token(file.parent / name, f"{kind}_token")
        if token is None:
            continue
        found = inner.token_to_id(token)
        if found is None:
            raise DataError(
                f"tokenizer.path: {file.parent / name}: {kind}_token is {token!r}, which {file.name} "
                "does not hold"
            )
        return found
    for token in usual:
        found = inner.token_to_id(token)
        if found is not None:
            return found
    raise DataError(
        f"tokenizer.path: {file}: no {kind.upper()} token: put {kind}_token in a tokenizer_config.json "
        f"beside it, or use a tokenizer that holds one of {', '.join(usual)}"
    )


def _named_token(file: Path, key: str) -> str | None:
    if not file.is_file():
        return None
    try:
        raw: Any = json.loads(file.read_bytes())
    except ValueError as error:
        raise DataError(f"tokenizer.path: {file}: not valid JSON: {error}") from None
    token: Any = cast("dict[str, Any]", raw).get(key) if isinstance(raw, dict) else None
    if isinstance(token, dict):  # an AddedToken written out
        token = cast("dict[str, Any]", token).get("content")
    return token if isinstance(token, str) else None


def split_text(text: str) -> Iterator[str]:
    """`text` in parts of at most 1 MiB of UTF-8, cut before the last white space, else between characters."""
    if 4 * len(text) <= PART_BYTES or len(data := text.encode()) <= PART_BYTES:
        yield text
        return
    start = 0
    while len(data) - start > PART_BYTES:
        end = start + PART_BYTES
        stop = max(data.rfind(space, start + 1, end) for space in (b" ", b"\n", b"\t", b"\r"))
        if stop < 0:
            stop = end
            while data[stop] & 0xC0 == 0x80:  # inside a character
                stop -= 1
        yield data[start:stop].decode()
        start = stop
    yield data[start:].decode()


def _some(texts: Iterable[str]) -> Iterator[str]:
    empty = True
    for text in texts:
        empty = False
        yield text
    if empty:
        raise DataError(
            "no text to train a tokenizer on; `flame data check` names what is wrong with the data"
        )


def train_tokenizer(texts: Iterable[str], vocab_size: int, directory: str | Path) -> None:
    """Train a byte-level BPE with `<|eos|>` and write it to `directory` as transformers loads it.

    Raises RecipeError for a vocabulary that cannot be, DataError where there is no text."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size <= len(alphabet):
        raise RecipeError(
            f"vocab_size: found {vocab_size}, expected more than {len(alphabet)}: "
            f"the 256 bytes and {EOS} take {len(alphabet) + 1}"
        )
    inner = tokenizers.Tokenizer(models.BPE())
    # the attributes' setters take these; the stubs show only their getters
    untyped = cast("Any", inner)
    untyped.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    untyped.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(_some(texts), trainer=trainer)
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    inner.save(str(folder / FILE_NAME))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2**60,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
