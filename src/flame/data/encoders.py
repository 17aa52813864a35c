"""Encoders: libraries that turn a batch of texts into token ids, all with the same ids or refused.

An encoder gives the ids of all texts in one array, so that no object is made for each document. None of
them adds special tokens, and text that spells one stays text.
"""

from __future__ import annotations

import json
import random
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any, Protocol, cast

import numpy as np
import tokenizers

from flame.errors import RecipeError

ADVERSARIAL = 2000  # texts on which a faster library must give the ids of `tokenizers`
# What splits text: letters of several scripts, marks, digits, blanks, controls, the corners of Unicode,
# contractions, and the letters that stand for bytes in a byte-level vocabulary.
PIECES = (
    *("a", "Zebra", "naïve", "ﬁ", "ß", "İ", "東京", "한국어", "עברית", "हिन्दी", "ไทย", "🔥", "🇩🇪", "e\u0301"),
    *(
        "\u0301",
        "👩\u200d👩\u200d👧",
        "0",
        "12",
        "1,234.5",
        "²",
        "Ⅷ",
        "٣",
        "'s",
        "'LL",
        "’re",
        "don't",
        "_",
        "--",
    ),
    *("://", "&nbsp;", "Ġ", "Ċ", "Â", " ", "  ", "\t", "\n", "\r\n", "\r", "\n\n\n", "\u00a0", "\u2003"),
    *("\u200b", "\u200d", "\u2028", "\u3000", "\x85", "\0", "\x1b", "\x7f", "\ufeff", "\ufffd", "\uffff"),
    *("\U0001f3fb", "\U0010ffff", "\u202e", "\xad", "\x0b", "\x0c"),
)


# All ids one after another, int32 [tokens], and where each text ends in them, int64 [texts].
Encoded = tuple[np.ndarray, np.ndarray]
Finish = Callable[[], Encoded]


class Encoder(Protocol):
    def encode(self, texts: Sequence[str]) -> Encoded:
        """The ids of texts."""
        ...

    def begin(self, texts: Sequence[str]) -> Finish:
        """The same, in two parts: what the library does without the interpreter lock is done now, and what
        needs the lock when the result is called, which may be in another thread."""
        made = self.encode(texts)
        return lambda: made

    def count(self, texts: Sequence[str]) -> int:
        """The tokens of these texts, nothing made of them: the library's own speed, to measure against."""
        ...


class Tokenizers(Encoder):
    """Hugging Face's library, in threads: the reference for the others."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        self._inner = inner

    def encode(self, texts: Sequence[str]) -> Encoded:
        return self.begin(texts)()

    def begin(self, texts: Sequence[str]) -> Finish:
        encodings = self._encodings(texts)

        def finish() -> Encoded:
            ids = array("I")  # which takes numbers in half the time that "i" does
            ends = np.empty(len(encodings), dtype=np.int64)
            for i, encoding in enumerate(encodings):
                ids += array("I", encoding.ids)
                ends[i] = len(ids)
            return np.frombuffer(ids, dtype=np.int32) if ids else np.zeros(0, dtype=np.int32), ends

        return finish

    def count(self, texts: Sequence[str]) -> int:
        return sum(map(len, self._encodings(texts)))

    def _encodings(self, texts: Sequence[str]) -> list[Any]:
        return self._inner.encode_batch_fast(list(texts), add_special_tokens=False)


class Gigatoken(Encoder):
    """gigatoken, of the same tokenizer.json."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        self._inner: Any = _library("gigatoken").Tokenizer.from_json(_without_special(inner))

    def encode(self, texts: Sequence[str]) -> Encoded:
        layout = self._inner.encode_batch(list(texts)).layout
        offsets = np.asarray(layout.offsets.data, dtype=np.int64)
        ids = np.asarray(layout.content.data).view(np.int32)[offsets[0] : offsets[-1]]  # of uint32
        return ids, offsets[1:] - offsets[0]

    def count(self, texts: Sequence[str]) -> int:
        return len(self._inner.encode_batch(list(texts)).layout.content)


class Fastokens(Encoder):
    """fastokens, of the same tokenizer.json."""

    def __init__(self, inner: tokenizers.Tokenizer) -> None:
        native = import_module(
            f"{_library('fastokens').__name__}._native"
        )  # its public door is for transformers
        self._inner: Any = native.Tokenizer.from_json_str(_without_special(inner))

    def encode(self, texts: Sequence[str]) -> Encoded:
        ids, offsets = self._inner.encode_batch_flat(list(texts))
        return np.frombuffer(ids, dtype=np.int32), np.frombuffer(offsets, dtype=np.int64)[1:]

    def count(self, texts: Sequence[str]) -> int:
        return len(self._inner.encode_batch_flat(list(texts))[0]) // 4


class Tiktoken(Encoder):
    """tiktoken, of an `Encoding`."""

    def __init__(self, encoding: Any) -> None:
        self._encoding = encoding

    def encode(self, texts: Sequence[str]) -> Encoded:
        found = [self._encoding.encode_to_numpy(text, disallowed_special=()) for text in texts]
        ends = np.cumsum([len(ids) for ids in found], dtype=np.int64)
        return np.concatenate([np.zeros(0, dtype=np.int32), *found]).astype(np.int32), ends

    def text_bytes(self) -> Iterator[tuple[int, int]]:
        """Each id that stands for text, with the bytes of this."""
        special = {self._encoding.encode_single_token(text) for text in self._encoding.special_tokens_set}
        for token in range(self._encoding.max_token_value + 1):
            if token not in special:
                with suppress(KeyError):  # an id that no token has
                    yield token, len(self._encoding.decode_single_token_bytes(token))

    def count(self, texts: Sequence[str]) -> int:
        return sum(len(self._encoding.encode_to_numpy(text, disallowed_special=())) for text in texts)


class Bytes(Encoder):
    """A token is a byte of UTF-8."""

    def encode(self, texts: Sequence[str]) -> Encoded:
        encoded = [text.encode() for text in texts]
        ids = np.frombuffer(b"".join(encoded), dtype=np.uint8).astype(np.int32)
        return ids, np.cumsum([len(content) for content in encoded], dtype=np.int64)

    def count(self, texts: Sequence[str]) -> int:
        return sum(len(text.encode()) for text in texts)


def make_encoder(backend: str, inner: tokenizers.Tokenizer) -> Encoder:
    """The encoder of a tokenizer.json by one of `config.BACKENDS`. Raises RecipeError where it cannot be."""
    if backend == "tokenizers":
        return Tokenizers(inner)
    kind = {"gigatoken": Gigatoken, "fastokens": Fastokens}[backend]
    try:
        return kind(inner)
    except RecipeError:
        raise
    except Exception as error:  # the libraries raise whatever they like for a tokenizer they do not know
        raise RecipeError(
            f'tokenizer.backend = "{backend}" cannot read this tokenizer ({error}); use "tokenizers"'
        ) from None


def check_equal(backend: str, fast: Encoder, reference: Encoder, texts: Sequence[str], where: str) -> None:
    """Refuse ids that are not the reference's. `where`: whose texts these are. Raises RecipeError."""
    (ids, ends), (expected, expected_ends) = fast.encode(texts), reference.encode(texts)
    if np.array_equal(ids, expected) and np.array_equal(ends, expected_ends):
        return
    for text in texts:
        got, right = (encoder.encode([text])[0].tolist() for encoder in (fast, reference))
        if got != right:
            raise RecipeError(
                f'tokenizer.backend = "{backend}" gives other ids than "tokenizers" on {where}: '
                f'{text[:80]!r} becomes {got[:12]}, expected {right[:12]}; use "tokenizers"'
            )
    raise RecipeError(
        f'tokenizer.backend = "{backend}" gives other ids in a batch on {where}; use "tokenizers"'
    )


def adversarial_texts(special: Sequence[str]) -> Iterator[str]:
    """Texts that tokenizers trip over, always the same. `special`: how the special tokens are spelled."""
    draw = random.Random(0)
    yield from ("", " ", "\n", *special, *(f"{token}{token} x{token}" for token in special))
    pieces = [*PIECES, *special]
    for _ in range(ADVERSARIAL):
        yield "".join(draw.choice(pieces) * draw.choice((1, 1, 1, 2, 7)) for _ in range(draw.randint(1, 12)))
    for _ in range(ADVERSARIAL):
        points = (draw.randrange(draw.choice((0x80, 0x800, 0x10000, 0x110000))) for _ in range(20))
        yield "".join(chr(point) for point in points if not 0xD800 <= point < 0xE000)


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise RecipeError(
            f'tokenizer.backend = "{name}": not installed ({error}); pip install "flame[{name}]"'
        ) from None


def _without_special(inner: tokenizers.Tokenizer) -> str:
    """The tokenizer.json without its special tokens: what spells one is then text."""
    raw = cast("dict[str, Any]", json.loads(inner.to_str()))
    raw["added_tokens"] = [token for token in raw["added_tokens"] if not token["special"]]
    raw["post_processor"] = None
    return json.dumps(raw)
