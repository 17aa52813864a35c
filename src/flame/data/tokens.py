"""Tokenizers: text to token ids in batches, and a new byte-level BPE from one's own text."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from flame.data.chat_tokens import ChatEncoder, Rendered
from flame.data.config import BYTES
from flame.data.encoders import (
    Bytes,
    Encoded,
    Encoder,
    Finish,
    Tiktoken,
    adversarial_texts,
    check_equal,
    make_encoder,
)
from flame.errors import DataError, RecipeError

PART_BYTES = 2**20  # longer text is tokenized in parts: some tokenizers are quadratic in it
FILE_NAME = "tokenizer.json"
EOS = "<|eos|>"  # of tokenizers trained here
USUAL_EOS = (EOS, "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eot_id|>")
USUAL_BOS = ("<|bos|>", "<|begin_of_text|>", "<s>", "<bos>", "<|startoftext|>")
PROBE = "Flame reads text: naïve café, 東京 🔥\n\tdef f(x): return x[0] + 1,234.5  <|eos|></s>"


# How tiktoken's own rank files split text, and their EOS; another file says it in a .json beside it.
CONTRACTIONS = r"'(?i:[sdmt]|ll|ve|re)"
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
CL100K_PATTERN = (
    CONTRACTIONS
    + r"|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
)
TIKTOKEN = {
    "gpt2": (GPT2_PATTERN, 50256),
    "r50k_base": (GPT2_PATTERN, 50256),
    "p50k_base": (GPT2_PATTERN, 50256),
    "cl100k_base": (CL100K_PATTERN, 100257),
}


class PartsEncoder(Protocol):
    """What the data plane asks of a tokenizer."""

    def begin(self, texts: Sequence[str], begins: Sequence[bool], ends: Sequence[bool]) -> Finish:
        """What gives the ids of documents, or of parts of long ones, one after another, int32 [tokens], and
        where each ends in them, int64 [texts]. `begins`, `ends`: whether it begins or ends a document. Of a
        conversation (a text that is `Rendered`), what has no loss is the id's complement.

        The library's work is done here, in whatever thread, and the rest where the result is called."""
        ...


class Tokenizer:
    """An encoder that ends (and, where asked, begins) each document by id.

    Text that spells a special token stays text.
    """

    def __init__(
        self,
        encoder: Encoder,
        decode: Callable[[list[int]], str],
        file_hash: str,
        vocab_size: int,
        eos_id: int,
        bos_id: int | None,
        special: Sequence[str] = (),
        inner: tokenizers.Tokenizer | None = None,
    ) -> None:
        """`decode`: ids to text, special tokens left out. `special`: how the special tokens are spelled.
        `inner`: what a tokenizer.json describes."""
        self.inner = inner
        self.encoder, self._decode, self._file_hash = encoder, decode, file_hash
        self.vocab_size, self.eos_id, self.bos_id, self.special = vocab_size, eos_id, bos_id, special

    @cached_property
    def chats(self) -> ChatEncoder:
        """Encodes conversations. Raises RecipeError where there is no tokenizer.json."""
        if self.inner is None:
            raise RecipeError(f"data.sources: chat needs a tokenizer with a {FILE_NAME}")
        return ChatEncoder(self.inner, self.eos_id, self.bos_id, split_text)

    def encode(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Each whole text's ids with EOS (and BOS): int32 [tokens], views of one array."""
        whole = [True] * len(texts)
        ids, stops = self.encode_parts(texts, whole, whole)
        return np.split(ids, stops[:-1]) if texts else []

    def encode_parts(self, texts: Sequence[str], begins: Sequence[bool], ends: Sequence[bool]) -> Encoded:
        """What `begin` gives, at once."""
        return self.begin(texts, begins, ends)()

    def begin(self, texts: Sequence[str], begins: Sequence[bool], ends: Sequence[bool]) -> Finish:
        """As `PartsEncoder` says."""
        if texts and isinstance(texts[0], Rendered):  # a source holds conversations or none
            chats = self.chats.encode(cast("Sequence[Rendered]", texts))
            return lambda: (np.concatenate(chats), np.cumsum([len(ids) for ids in chats]))
        finish = self.encoder.begin(texts)
        return lambda: self._with_ends(*finish(), begins, ends)

    def _with_ends(
        self, ids: np.ndarray, stops: np.ndarray, begins: Sequence[bool], ends: Sequence[bool]
    ) -> Encoded:
        """BOS and EOS where documents begin and end."""
        if not len(stops):
            return ids, stops
        last = np.array(ends)
        first = np.array(begins) if self.bos_id is not None else np.zeros_like(last)
        added = np.cumsum(first.astype(np.int64) + last)
        stops = stops + added
        eos = stops[last] - 1
        whole = np.empty(len(ids) + int(added[-1]), dtype=np.int32)
        text = np.ones(len(whole), dtype=bool)
        text[eos] = False
        whole[eos] = self.eos_id
        if self.bos_id is not None:
            bos = np.concatenate([[0], stops[:-1]])[first]
            text[bos] = False
            whole[bos] = self.bos_id
        whole[text] = ids
        return whole, stops

    def count_alone(self, texts: Sequence[str]) -> int:
        """The tokens of these texts by the library alone, nothing made of them: to measure against."""
        return self.encoder.count(texts)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of `ids`, special tokens left out."""
        return self._decode([int(i) for i in ids])

    def identity(self) -> dict[str, Any]:
        """What the fingerprint holds of it: the file's hash, the ids added, the ids of a fixed text."""
        return {
            "file_hash": self._file_hash,
            "eos": self.eos_id,
            "bos": self.bos_id,
            "probe": [int(i) for i in self.encode([PROBE])[0]],
        }


def load_tokenizer(path: str | Path, bos: bool, backend: str = "tokenizers") -> Tokenizer:
    """The tokenizer at `path`: a tokenizer.json or a directory that holds one, a file of tiktoken ranks, or
    "bytes". `backend`: the library that encodes, one of `BACKENDS`; `check_backend` compares it.

    Raises DataError for a file that cannot be used and RecipeError for a library that cannot.
    """
    path = Path(path)
    if str(path) != BYTES and path.suffix != ".tiktoken":
        return _huggingface(path, bos, backend)
    if backend != "tokenizers":
        raise RecipeError(f'tokenizer.backend = "{backend}" needs a {FILE_NAME}; found {path}')
    if str(path) != BYTES:
        return _tiktoken(path, bos)
    if bos:
        raise RecipeError('tokenizer.bos: "bytes" has 256 bytes and EOS, and no BOS; leave it out')
    return Tokenizer(
        Bytes(), lambda ids: bytes(i for i in ids if i < 256).decode(errors="replace"), BYTES, 257, 256, None
    )


def check_backend(path: str | Path, backend: str, texts: Sequence[str]) -> None:
    """Refuse a library whose ids are not those of `tokenizers`, on these texts of the recipe's own and on a
    fixed set that tokenizers trip over. Raises RecipeError."""
    if backend == "tokenizers":
        return
    fast, reference = load_tokenizer(path, False, backend), load_tokenizer(path, False)
    fixed = list(adversarial_texts(reference.special))
    check_equal(backend, fast.encoder, reference.encoder, fixed, "a fixed text")
    check_equal(backend, fast.encoder, reference.encoder, texts, "the recipe's own text")


def _huggingface(path: Path, bos: bool, backend: str) -> Tokenizer:
    file = path / FILE_NAME if path.is_dir() else path
    inner = _load(file)
    inner.encode_special_tokens = True
    inner.no_padding()
    inner.no_truncation()
    special = [str(token.content) for token in inner.get_added_tokens_decoder().values()]
    return Tokenizer(
        make_encoder(backend, inner),
        lambda ids: inner.decode(ids, skip_special_tokens=True),
        _hash(file.read_bytes()),
        max(inner.get_vocab(with_added_tokens=True).values(), default=-1) + 1,
        _special_id(inner, file, "eos", USUAL_EOS),
        _special_id(inner, file, "bos", USUAL_BOS) if bos else None,
        special,
        inner,
    )


def _tiktoken(file: Path, bos: bool) -> Tokenizer:
    """Ranks of tiktoken: a line a token, base64 and rank. The pattern and the special tokens are known by the
    file's name or lie beside it, as {"pattern": "...", "special_tokens": {"<|endoftext|>": 50256}}."""
    try:
        tiktoken: Any = import_module("tiktoken")
    except ImportError:
        raise RecipeError(
            f'tokenizer.path: {file}: tiktoken is not installed; pip install "flame[tiktoken]"'
        ) from None
    beside = file.with_suffix(".json")
    try:
        content = file.read_bytes()
        lines = (line.split() for line in content.splitlines() if line)
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        said: dict[str, Any] = json.loads(beside.read_bytes()) if beside.exists() else {}
        if not said and file.stem in TIKTOKEN:
            pattern, eos = TIKTOKEN[file.stem]
            said = {"pattern": pattern, "special_tokens": {"<|endoftext|>": eos}}
        if not said:
            known = ", ".join(TIKTOKEN)
            raise DataError(
                f"tokenizer.path: {file}: ranks say nothing of how text is split: put "
                f'{{"pattern": "...", "special_tokens": {{"<|endoftext|>": {len(ranks)}}}}} in {beside}, or '
                f"name the file as tiktoken does ({known})"
            )
        special: dict[str, int] = {str(k): int(v) for k, v in said["special_tokens"].items()}
        encoding = tiktoken.Encoding(
            file.stem, pat_str=said["pattern"], mergeable_ranks=ranks, special_tokens=special
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"tokenizer.path: {file}: cannot be read as tiktoken ranks: {error!r}") from None
    named = {
        kind: next((special[t] for t in usual if t in special), None)
        for kind, usual in (("EOS", USUAL_EOS), ("BOS", USUAL_BOS))
    }
    for kind in ("EOS", "BOS") if bos else ("EOS",):
        if named[kind] is None:
            raise DataError(
                f"tokenizer.path: {beside}: special_tokens names no {kind} token; found: {[*special]}"
            )
    own = frozenset(special.values())
    return Tokenizer(
        Tiktoken(encoding),
        lambda ids: encoding.decode([i for i in ids if i not in own]),
        _hash(content + json.dumps(said, sort_keys=True).encode()),
        encoding.max_token_value + 1,
        cast("int", named["EOS"]),
        named["BOS"] if bos else None,
        [*special],
    )


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


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


def split_text(text: str) -> list[str]:
    """`text` in parts of at most 1 MiB of UTF-8, cut before the last white space, else between characters."""
    if isinstance(text, Rendered):  # its encoder splits what stands between special tokens
        return [text]
    if 4 * len(text) <= PART_BYTES or len(data := text.encode()) <= PART_BYTES:
        return [text]
    parts: list[str] = []
    start = 0
    while len(data) - start > PART_BYTES:
        end = start + PART_BYTES
        stop = max(data.rfind(space, start + 1, end) for space in (b" ", b"\n", b"\t", b"\r"))
        if stop < 0:
            stop = end
            while data[stop] & 0xC0 == 0x80:  # inside a character
                stop -= 1
        parts.append(data[start:stop].decode())
        start = stop
    return [*parts, data[start:].decode()]


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
