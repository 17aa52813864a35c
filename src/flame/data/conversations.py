"""Where a record's conversation is: in a field of messages, or in a prompt and what answers it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from flame.data.formats import Bad
from flame.data.messages import MESSAGES, Cannot, Message, holds_messages, messages_of
from flame.data.tables import holds_text
from flame.data.template import Template


class Conversations(Protocol):
    """What finds the conversation of a record. Picklable."""

    taken: ClassVar[str]  # what a value of it is, for people

    @property
    def columns(self) -> tuple[str, ...]:
        """The record's fields that it reads, whole."""
        ...

    @property
    def paths(self) -> list[tuple[str, ...]]:
        """The values that it takes out of them, by path."""
        ...

    def takes(self, kind: Any) -> bool:
        """Whether a table's value of this Arrow type can be such a value."""
        ...

    def identity(self) -> dict[str, Any]:
        """What the fingerprint holds of it."""
        ...

    def messages(self, record: dict[str, Any]) -> list[Message]:
        """The conversation. Raises Cannot where there is none."""
        ...


@dataclass(frozen=True)
class MessagesField:
    """A list of messages in one field."""

    field: str
    taken: ClassVar[str] = MESSAGES

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.field,)

    @property
    def paths(self) -> list[tuple[str, ...]]:
        return [(self.field,)]

    def takes(self, kind: Any) -> bool:
        return holds_messages(kind)

    def identity(self) -> dict[str, Any]:
        return {"chat": self.field}

    def messages(self, record: dict[str, Any]) -> list[Message]:
        return messages_of(record, self.field)


@dataclass(frozen=True)
class PromptAndCompletion:
    """One turn of the user and one of the assistant, each made of fields."""

    prompt: Template
    completion: Template
    taken: ClassVar[str] = "text"

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.prompt.columns, *self.completion.columns)))

    @property
    def paths(self) -> list[tuple[str, ...]]:
        return list(dict.fromkeys((*self.prompt.paths, *self.completion.paths)))

    def takes(self, kind: Any) -> bool:
        return holds_text(kind)

    def identity(self) -> dict[str, Any]:
        return {"prompt": self.prompt.written, "completion": self.completion.written}

    def messages(self, record: dict[str, Any]) -> list[Message]:
        user = _filled(self.prompt, "prompt", record)
        assistant = _filled(self.completion, "completion", record)
        return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def _filled(template: Template, name: str, record: dict[str, Any]) -> str:
    """Without white space around it: where a field at an end is empty, what parts it from others is gone."""
    text = template.text(record)
    if isinstance(text, Bad):
        raise Cannot(f"{name}: {text.reason}")
    if not text.strip():
        raise Cannot(f"{name}: empty text")
    return text.strip()
