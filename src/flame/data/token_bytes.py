"""How many bytes of text each token stands for, so that losses of different tokenizers can be compared."""

from __future__ import annotations

import json
import re
from typing import Any, cast

import numpy as np
import tokenizers
from tokenizers import pre_tokenizers

from flame.data.encoders import Bytes, Tiktoken
from flame.data.tokens import Tokenizer

ONE_BYTE = re.compile(r"<0x[0-9A-Fa-f]{2}>")  # how a tokenizer with byte fallback writes one


def token_bytes(tokenizer: Tokenizer) -> np.ndarray:
    """The UTF-8 bytes of the text that each id stands for: int64 [vocab_size].

    Special tokens stand for no text: 0. Summed over a document's tokens these are the bytes of the text that
    the tokens decode to. For byte-level tokenizers that is the document's text, exactly.
    """
    sizes = np.zeros(tokenizer.vocab_size, dtype=np.int64)
    if tokenizer.inner is not None:
        _fill_huggingface(sizes, tokenizer.inner)
    elif isinstance(tokenizer.encoder, Tiktoken):
        for token, count in tokenizer.encoder.text_bytes():
            sizes[token] = count
    else:
        assert isinstance(tokenizer.encoder, Bytes)
        sizes[:256] = 1
    return sizes


def _fill_huggingface(sizes: np.ndarray, inner: tokenizers.Tokenizer) -> None:
    kinds = set(_kinds(json.loads(inner.to_str())["decoder"]))
    added = inner.get_added_tokens_decoder()
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    anchor = inner.encode("a", add_special_tokens=False).ids[-1:]
    before = len(inner.decode(anchor).encode())
    for text, token in inner.get_vocab(with_added_tokens=True).items():
        if token in added:
            sizes[token] = 0 if added[token].special else len(text.encode())
        elif "ByteLevel" in kinds and alphabet.issuperset(text):
            sizes[token] = len(text)  # each of its characters stands for a byte
        elif "ByteFallback" in kinds and ONE_BYTE.fullmatch(text):
            sizes[token] = 1
        else:  # after another token, because a decoder may drop the space that begins a text
            sizes[token] = max(0, len(inner.decode([*anchor, token]).encode()) - before)


def _kinds(decoder: Any) -> list[str]:
    """The types of a decoder and of those that it is made of."""
    if not isinstance(decoder, dict):
        return []
    found = cast("dict[str, Any]", decoder)
    inner = [kind for part in found.get("decoders", []) for kind in _kinds(part)]
    return [str(found.get("type")), *inner]
