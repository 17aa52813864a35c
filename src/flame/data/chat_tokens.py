"""Conversations as token ids: the template's special tokens by id, all other text as text, and the loss where
it belongs."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import numpy as np
import tokenizers

Spans = tuple[tuple[int, int], ...]  # (start, end) in characters, in order, apart


class Special(NamedTuple):
    """A special token that a template wrote, white space that it swallows included."""

    start: int  # in characters of the text
    end: int
    token: str


class Rendered(str):
    """The text of a conversation, as its template writes it."""

    __slots__ = ("specials", "trained")
    specials: tuple[Special, ...]  # special tokens; what spells one elsewhere is text
    trained: Spans  # where the loss is

    @classmethod
    def of(cls, text: str, specials: Sequence[Special], trained: Spans) -> Rendered:
        rendered = cls(text)
        rendered.specials, rendered.trained = tuple(specials), trained
        return rendered


@dataclass
class Assembly:
    """The tokens of one conversation as they are found: ids, and where each lies in the text."""

    ids: list[np.ndarray] = field(default_factory=list[np.ndarray])
    starts: list[np.ndarray] = field(default_factory=list[np.ndarray])
    ends: list[np.ndarray] = field(default_factory=list[np.ndarray])

    def add(self, ids: Sequence[int], offsets: Sequence[tuple[int, int]], at: int) -> None:
        """`offsets`: of each token, from `at` on."""
        bounds = np.array(offsets, dtype=np.int64).reshape(-1, 2) + at
        self.ids.append(np.array(ids, dtype=np.int32))
        self.starts.append(bounds[:, 0])
        self.ends.append(bounds[:, 1])

    def tokens(self, trained: Spans) -> np.ndarray:
        """int32 [tokens]; one that lies in no trained span is written as its complement."""
        if not self.ids:
            return np.zeros(0, dtype=np.int32)
        ids = np.concatenate(self.ids)
        starts, ends = np.concatenate(self.starts), np.concatenate(self.ends)
        if not trained:
            return ~ids
        first, last = np.array(trained, dtype=np.int64).T
        span = np.searchsorted(last, starts, side="right")  # the first that ends behind the token's start
        inside = span < len(last)
        inside[inside] = first[span[inside]] < ends[inside]
        return np.where(inside, ids, ~ids)


def plain_ids(tokens: np.ndarray) -> np.ndarray:
    """The ids, of which those without loss are complements."""
    return np.where(tokens < 0, ~tokens, tokens)


class ChatEncoder:
    """Encodes rendered conversations with a tokenizer.json.

    Between two special tokens of the template the text is encoded in one go, so that without special tokens
    spelled in messages the ids are those that transformers gives for the whole.
    """

    def __init__(
        self, inner: tokenizers.Tokenizer, eos_id: int, bos_id: int | None, split: Callable[[str], list[str]]
    ) -> None:
        """`bos_id`: where each document begins with it. `split`: cuts text that is too long to encode."""
        raw = cast("dict[str, Any]", json.loads(inner.to_str()))
        raw["post_processor"] = None  # it would move the tokens' ends
        self._first, self._next = _plain(raw), _plain(_without_prefix(raw))
        self._eos, self._bos, self._split = eos_id, bos_id, split

    def encode(self, chats: Sequence[Rendered]) -> list[np.ndarray]:
        """The tokens of each: int32, BOS first where asked for, EOS last exactly once. A token without loss
        is written as its complement (~id)."""
        made = [Assembly() for _ in chats]
        places: list[tuple[int, int, int]] = []  # chat, first character, text (-1: a special)
        texts: list[str] = []
        for number, chat in enumerate(chats):
            at = 0
            for special in (*chat.specials, Special(len(chat), len(chat), "")):
                for piece in self._split(chat[at : special.start]) if special.start > at else ():
                    places.append((number, at, len(texts)))
                    texts.append(piece)
                    at += len(piece)
                if special.token:
                    places.append((number, special.start, -1))
                at = special.end
        found = self._encode(texts, [at for _, at, text in places if text >= 0])
        specials = iter([special for chat in chats for special in chat.specials])
        for number, at, text in places:
            if text >= 0:
                made[number].add(found[text].ids, found[text].offsets, at)
            else:
                special = next(specials)
                made[number].add([self.id_of(special.token)], [(0, special.end - special.start)], at)
        return [self._ended(parts.tokens(chat.trained)) for parts, chat in zip(made, chats, strict=True)]

    @property
    def eos_token(self) -> str:
        """How the tokenizer spells EOS."""
        return self.token_of(self._eos)

    def special_tokens(self) -> list[Any]:
        """The tokenizer's special tokens, as its library describes them."""
        return [token for token in self._first.get_added_tokens_decoder().values() if token.special]

    def parses_as_whole(self, chat: Rendered) -> bool:
        """Whether a text without specials in its messages gets the ids that the tokenizer gives to all of
        it."""
        self._first.encode_special_tokens = False
        whole = np.array(self._first.encode(str(chat), add_special_tokens=False).ids, dtype=np.int32)
        self._first.encode_special_tokens = True
        (found,) = self.encode([chat])
        return np.array_equal(plain_ids(found), plain_ids(self._ended(whole)))

    def id_of(self, token: str) -> int:
        """The id of a special token."""
        found = self._first.token_to_id(token)
        assert found is not None
        return found

    def token_of(self, number: int) -> str:
        """How a token is spelled."""
        return str(self._first.id_to_token(number))

    def _encode(self, texts: list[str], starts: list[int]) -> list[Any]:
        """Encodings with offsets. Only what begins a conversation gets what begins a text."""
        found: list[Any] = [None] * len(texts)
        for encoder, begins in ((self._first, True), (self._next, False)):
            chosen = [i for i, start in enumerate(starts) if (start == 0) == begins]
            encoded = encoder.encode_batch([texts[i] for i in chosen], add_special_tokens=False)
            for i, encoding in zip(chosen, encoded, strict=True):
                found[i] = encoding
        return found

    def _ended(self, tokens: np.ndarray) -> np.ndarray:
        """With BOS and EOS where they are missing. An EOS that follows on trained text is trained: it is what
        ends the turn."""
        parts = [tokens]
        if self._bos is not None and (not len(tokens) or tokens[0] not in (self._bos, ~self._bos)):
            parts.insert(0, np.array([~self._bos], dtype=np.int32))
        if not len(tokens) or tokens[-1] not in (self._eos, ~self._eos):
            trained = len(tokens) > 0 and tokens[-1] >= 0
            parts.append(np.array([self._eos if trained else ~self._eos], dtype=np.int32))
        return np.concatenate(parts)


def _plain(raw: dict[str, Any]) -> tokenizers.Tokenizer:
    inner = tokenizers.Tokenizer.from_str(json.dumps(raw))
    inner.encode_special_tokens = True
    inner.no_padding()
    inner.no_truncation()
    return inner


def _without_prefix(raw: dict[str, Any]) -> dict[str, Any]:
    """The tokenizer for text behind a special token, where one puts a blank before the first word only."""
    raw = json.loads(json.dumps(raw))
    top = cast("dict[str, Any]", raw.get("pre_tokenizer") or {})
    for part in (top, *cast("list[dict[str, Any]]", top.get("pretokenizers") or [])):
        if part.get("type") == "Metaspace" and part.get("prepend_scheme") == "first":
            part["prepend_scheme"] = "never"
    return raw
