"""Conversations: records of messages, rendered by a chat template as transformers renders them.

What spells a special token in a message stays text: it is marked before the template sees it, and only
what is not marked afterwards was written by the template. The loss is on the model's own words: those that
the template marks by `{% generation %}`, else what it writes for a turn behind its generation prompt.
"""

from __future__ import annotations

import hashlib
import json
import re
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from typing import Any, NamedTuple, cast

from flame.data.chat_tokens import Rendered, Special
from flame.data.conversations import Conversations
from flame.data.formats import Bad
from flame.data.jinja import BEGIN, END, MARKS, TAINT, compiled, marks_generation
from flame.data.messages import (
    Cannot,
    Message,
    strings_in,
    tools_of,
)

ANY_MARK = re.compile(f"[{MARKS}]")
GENERATION_MARK = re.compile(f"([{BEGIN}{END}])")

Span = tuple[int, int]


class SpecialToken(NamedTuple):
    """How a special token of the tokenizer is found in text."""

    content: str
    swallows_left: bool = False  # the white space before it
    swallows_right: bool = False

    @property
    def pattern(self) -> str:
        """As a regular expression, the token itself a group of its own."""
        alone = f"(?!{TAINT})" if len(self.content) == 1 else ""  # too short for a mark inside
        left, right = r"\s*" * self.swallows_left, r"\s*" * self.swallows_right
        return f"{left}({re.escape(self.content)}){alone}{right}"


@dataclass(frozen=True)
class Chat:
    """How a source's conversations become text. Picklable."""

    conversations: Conversations  # in records
    templates: dict[str, str]  # by name: "default", and "tool_use" where there is one for tools
    variables: dict[str, str]  # the special tokens by name, as the template knows them
    specials: tuple[SpecialToken, ...]
    train_on: str  # one of `config.TRAIN_ON`
    today: date | None  # what the clock says to the template

    @property
    def columns(self) -> tuple[str, ...]:
        """The fields of a record that are read."""
        return self.conversations.columns

    @property
    def optional(self) -> tuple[str, ...]:
        """And those that are read where they are there."""
        return ("tools",)

    @property
    def paths(self) -> list[tuple[str, ...]]:
        """The values that are taken out of a record, by path."""
        return self.conversations.paths

    @property
    def taken(self) -> str:
        """What such a value is, for people."""
        return self.conversations.taken

    def takes(self, kind: Any) -> bool:
        """Whether a table's value of this Arrow type may be such a value."""
        return self.conversations.takes(kind)

    def identity(self) -> dict[str, Any]:
        """What the fingerprint holds of it."""
        content = json.dumps([self.templates, self.variables, self.specials], sort_keys=True).encode()
        return {
            **self.conversations.identity(),
            "chat_template": hashlib.blake2b(content, digest_size=16).hexdigest(),
            "chat_date": None if self.today is None else self.today.isoformat(),
            "train_on": self.train_on,
        }

    def text(self, record: dict[str, Any]) -> Rendered | Bad:
        """A record's conversation, or why it cannot be trained: a fact of the record alone."""
        try:
            return self.rendered(self.conversations.messages(record), tools_of(record))
        except Cannot as error:
            return Bad(str(error))

    def rendered(self, messages: list[Message], tools: list[Any] | None) -> Rendered:
        """A conversation as text, with what is trained of it. Raises Cannot."""
        found = next((m for s in strings_in([messages, tools]) if (m := ANY_MARK.search(s))), None)
        if found:
            raise Cannot(f"a message holds U+{ord(found[0]):04X}, which is no character")
        name = "tool_use" if tools is not None and "tool_use" in self.templates else "default"
        writer = Writer(self, name, [self._tainted_message(m) for m in messages], self._tainted(tools))
        written, generated = without_generation_marks(writer.write(len(messages)))
        specials = list(self._find(written))
        if specials and specials[-1].token == self.variables.get("eos_token"):
            end = specials[-1].end  # a document ends with EOS
            written = written if written[end:].strip() else written[:end]
        if self.train_on == "all":
            trained = [(0, len(written))]
        elif marks_generation(self.templates[name]):
            trained = self._generated(messages, generated)
        else:
            trained = [self._turn(writer, written, specials, turn) for turn in self._turns(messages)]
        place = Places(written)
        spans = tuple((place(a), place(b)) for a, b in trained if place(a) < place(b))
        if not spans:
            raise Cannot("no turn of the assistant to train on")
        found_specials = [Special(place(s.start), place(s.end), s.token) for s in specials]
        return Rendered.of(written.replace(TAINT, ""), found_specials, spans)

    # ------------------------------------------------------------------------------- the loss

    def _turns(self, messages: list[Message]) -> list[int]:
        """The messages to train on."""
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        chosen = turns[-1:] if self.train_on == "last" else turns
        return [i for i in chosen if messages[i].get("weight", 1) != 0]

    def _generated(self, messages: list[Message], spans: list[Span]) -> list[Span]:
        """Of the spans that the template marks, those of the messages to train on."""
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        chosen = self._turns(messages)
        if chosen == turns:
            return spans
        if len(spans) != len(turns):
            raise Cannot(f"the template marks {len(spans)} spans for {len(turns)} turns of the assistant")
        return [span for turn, span in zip(turns, spans, strict=True) if turn in chosen]

    def _turn(self, writer: Writer, written: str, specials: list[Special], turn: int) -> Span:
        """What a template writes for one turn behind its generation prompt, up to the token that ends it."""
        before = writer.write(turn, prompt=True)
        last = turn == len(writer.messages) - 1
        after = written if last else writer.write(turn + 1)
        if not (written.startswith(after) and after.startswith(before)):
            raise Cannot(
                f"the template writes the first {turn + 1} messages differently when others follow, and "
                "marks no {% generation %}: the turns cannot be told apart"
            )
        start, end = len(before), len(after)
        ended = max((special.end for special in specials if start < special.end <= end), default=end)
        return start, end if written[ended:end].strip() else ended

    # ------------------------------------------------------------------------- special tokens

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        """Any special token; the longest where several begin at one place."""
        ordered = sorted(self.specials, key=lambda token: len(token.content), reverse=True)
        return re.compile("|".join(token.pattern for token in ordered) or "(?!)")

    @cached_property
    def _spelled(self) -> re.Pattern[str]:
        """What spells a special token."""
        contents = sorted((token.content for token in self.specials), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, contents)) or "(?!)")

    @cached_property
    def _edges(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The ends and the beginnings of special tokens: a string that begins or ends so could spell one
        together with what stands beside it."""
        contents = [token.content for token in self.specials]
        tails = {content[i:] for content in contents for i in range(1, len(content))}
        heads = {content[:i] for content in contents for i in range(1, len(content))}
        return tuple(sorted(tails)), tuple(sorted(heads))

    def _find(self, written: str) -> Iterator[Special]:
        """The special tokens that the template wrote."""
        for match in self._pattern.finditer(written):
            assert match.lastindex is not None
            yield Special(match.start(), match.end(), match[match.lastindex])

    def _tainted_message(self, message: Message) -> Message:
        """All of a message but its role, which names a speaker and says nothing."""
        return {key: value if key == "role" else self._tainted(value) for key, value in message.items()}

    def _tainted(self, value: Any) -> Any:
        """With a mark inside all that spells a special token, or could with what stands beside it."""
        if isinstance(value, dict):
            return {key: self._tainted(item) for key, item in cast("dict[str, Any]", value).items()}
        if isinstance(value, list):
            return [self._tainted(item) for item in cast("list[Any]", value)]
        if not isinstance(value, str):
            return value
        tails, heads = self._edges
        text = self._spelled.sub(lambda match: match[0][0] + TAINT + match[0][1:], value)
        before, after = text.startswith(tails), text.endswith(heads)
        return f"{TAINT * before}{text}{TAINT * after}"


class Writer:
    """Writes one conversation, or its beginnings."""

    def __init__(self, chat: Chat, template: str, messages: list[Message], tools: Any) -> None:
        self._chat, self.messages, self._tools = chat, messages, tools
        self._template = compiled(chat.templates[template], chat.today)

    def write(self, count: int, prompt: bool = False) -> str:
        """The first `count` messages, marks included. `prompt`: and what comes before a model's answer."""
        try:
            return self._template.render(
                messages=self.messages[:count],
                tools=self._tools,
                documents=None,
                add_generation_prompt=prompt,
                **self._chat.variables,
            )
        except Exception as error:  # a template raises whatever it likes
            reason = " ".join(str(error).split()) or type(error).__name__
            raise Cannot(f"the chat template refuses it: {reason}") from None


class Places:
    """Where characters of marked text lie without the marks."""

    def __init__(self, written: str) -> None:
        self._marks = [match.start() for match in re.finditer(TAINT, written)]

    def __call__(self, at: int) -> int:
        return at - bisect_left(self._marks, at)


def without_generation_marks(text: str) -> tuple[str, list[Span]]:
    """What a template wrote without the marks around the model's words, and where those words are."""
    parts: list[str] = []
    spans: list[Span] = []
    length, begun = 0, -1
    for part in GENERATION_MARK.split(text):
        if part in (BEGIN, END):
            if (part == BEGIN) != (begun < 0):
                raise Cannot("the template's {% generation %} blocks lie in each other")
            if part == END:
                spans.append((begun, length))
            begun = length if part == BEGIN else -1
        else:
            parts.append(part)
            length += len(part)
    return "".join(parts), spans
