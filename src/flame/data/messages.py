"""The messages of a conversation, in the one form that chat templates know, whatever form they came in."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, cast

import pyarrow

arrow = cast("Any", pyarrow)

Message = dict[str, Any]
MESSAGES = "a list of messages"

ROLES = {  # of ShareGPT and its kin, by the names they give to speakers
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "observation", "function", "function_response"), "tool"),
}
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of a message's reasoning; the first counts


class Cannot(Exception):
    """Why a record's conversation cannot be trained; its only argument is the reason."""


def messages_of(record: dict[str, Any], field: str) -> list[Message]:
    """A record's messages as {"role", "content", ...}, also where they came as {"from", "value"}. Raises
    Cannot where it holds none."""
    if field not in record:
        raise Cannot(f'no field "{field}"')
    found: Any = record[field]
    if not isinstance(found, list):
        raise Cannot(f'field "{field}" is {"null" if found is None else "no list of messages"}')
    listed = cast("list[Any]", found)
    if not listed:
        raise Cannot("a conversation without messages")
    return [_message(message, number) for number, message in enumerate(listed)]


def _message(raw: Any, number: int) -> Message:
    if not isinstance(raw, dict):
        raise Cannot(f"message {number} is no object")
    # as transformers does: a key without a value is not there
    message = {key: value for key, value in cast("Message", raw).items() if value is not None}
    if "role" not in message and "from" in message:
        speaker = message.pop("from")
        if speaker not in ROLES:
            raise Cannot(f'message {number} is from "{speaker}", who is not known')
        message["role"] = ROLES[speaker]
        if "value" in message:
            message["content"] = message.pop("value")
    if not isinstance(message.get("role"), str):
        raise Cannot(f"message {number} has no role")
    content = message.get("content")
    if not isinstance(content, (str, list)) and not ("tool_calls" in message and content is None):
        raise Cannot(f"message {number} has no content")
    thoughts = next((message[key] for key in REASONING if key in message), None)
    if thoughts is not None:  # as transformers does: templates know it by one name or the other
        message = {"thinking": thoughts, **message, "reasoning_content": thoughts}
    return message


def tools_of(record: dict[str, Any]) -> list[Any] | None:
    """The tools that a record declares, also where they are written as JSON in a string."""
    tools: Any = record.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError:
            raise Cannot('field "tools" is a string, and not JSON') from None
    if tools is not None and not isinstance(tools, list):
        raise Cannot('field "tools" is no list')
    return cast("list[Any] | None", tools)


def contents_of(messages: list[Message]) -> str:
    """What the messages say, a paragraph each: text to train a tokenizer on."""
    return "\n\n".join(text for message in messages for text in strings_in(message.get("content")))


def strings_in(value: Any) -> Iterator[str]:
    """All strings, keys left out."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in cast("dict[str, Any]", value).values():
            yield from strings_in(item)
    elif isinstance(value, list):
        for item in cast("list[Any]", value):
            yield from strings_in(item)


def holds_messages(kind: Any) -> bool:
    """Whether a column of this Arrow type may be conversations."""
    types = arrow.types
    return (types.is_list(kind) or types.is_large_list(kind)) and types.is_struct(kind.value_type)
