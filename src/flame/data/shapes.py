"""What makes the texts of a source, where that is no single field: a template, or a chat template."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any, cast

import jinja2

from flame.data.chat import Chat, SpecialToken
from flame.data.config import SourceConfig
from flame.data.conversations import Conversations, MessagesField, PromptAndCompletion
from flame.data.jinja import CLOCK, compiled, reads_clock
from flame.data.messages import Cannot
from flame.data.records import Contents, Shape
from flame.data.template import Template
from flame.data.tokens import Tokenizer
from flame.errors import RecipeError

CONFIG_FILE, TEMPLATE_FILE = "tokenizer_config.json", "chat_template.jinja"  # beside tokenizer.json
PROBE = (  # a conversation that every template should render
    {"role": "user", "content": "How far is it?"},
    {"role": "assistant", "content": "  Two miles,\n\nor three."},
    {"role": "user", "content": "Thank you!"},
    {"role": "assistant", "content": "Ünd 東京 🔥"},
)


def shape_of(
    config: SourceConfig, base: Path, tokenizer_path: Path | None = None, tokenizer: Tokenizer | None = None
) -> Shape | None:
    """What makes the texts of a source; None where a field or a file is the text. Without a tokenizer, a
    conversation is what its messages say. Raises RecipeError."""
    where = f'data.sources: source "{config.name}"'
    ways = {
        "text": config.text,
        "template": config.template,
        "chat": config.chat,
        "prompt": config.prompt,
        "ids": config.ids or None,
    }
    given = [name for name, value in ways.items() if value is not None]
    if len(given) > 1 and given != ["text", "ids"]:  # which has an error of its own
        raise RecipeError(f"{where}: {' and '.join(given)} exclude each other; give one of them")
    found = conversations_of(config, where)
    if config.template is not None:
        return Template.parse(config.template, config.name)
    if found is None:
        return None
    if tokenizer is None or tokenizer_path is None:
        return Contents(found)
    return open_chat(config, found, where, base, tokenizer_path, tokenizer)


def conversations_of(config: SourceConfig, where: str) -> Conversations | None:
    """Where a source has its conversations; None where it has none. Raises RecipeError."""
    if (config.prompt is None) != (config.completion is None):
        raise RecipeError(f"{where}: prompt and completion need each other; give both")
    if config.chat is not None:
        return MessagesField(config.chat)
    if config.prompt is not None and config.completion is not None:
        return PromptAndCompletion(
            Template.parse(config.prompt, config.name, "prompt"),
            Template.parse(config.completion, config.name, "completion"),
        )
    given = {"chat_template": config.chat_template, "chat_date": config.chat_date}
    given |= {"train_on": None if config.train_on == "assistant" else config.train_on}
    stray = [name for name, value in given.items() if value is not None]
    if stray:
        raise RecipeError(
            f'{where}: {stray[0]} is for conversations; set chat = "messages", or prompt and completion, or '
            "leave it out"
        )
    return None


def open_chat(
    config: SourceConfig,
    conversations: Conversations,
    where: str,
    base: Path,
    tokenizer_path: Path,
    tokenizer: Tokenizer,
) -> Chat:
    """A source's conversations and the template that renders them, tried on a plain one. Raises
    RecipeError."""
    encoder = tokenizer.chats
    folder = tokenizer_path if tokenizer_path.is_dir() else tokenizer_path.parent
    raw = _read_config(folder / "special_tokens_map.json", where) | _read_config(folder / CONFIG_FILE, where)
    if config.chat_template is not None:
        templates = {"default": _read(base / Path(config.chat_template).expanduser(), where)}
    elif (folder / TEMPLATE_FILE).is_file():
        templates = {"default": _read(folder / TEMPLATE_FILE, where)}
    else:
        templates = _templates_in(raw)
    if "default" not in templates:
        raise RecipeError(
            f"{where}: the tokenizer {tokenizer_path} has no chat template (neither {TEMPLATE_FILE} nor "
            f'chat_template in {CONFIG_FILE}); name one: chat_template = "file.jinja"'
        )
    today = _day(config.chat_date, where)
    for text in templates.values():
        try:
            compiled(text, today)
        except jinja2.TemplateError as error:
            raise RecipeError(f"{where}: the chat template is no Jinja: {error}") from None
        if today is None and reads_clock(text):
            raise RecipeError(
                f"{where}: the chat template writes the date ({CLOCK}), and rows must not depend on the day: "
                'fix it, such as chat_date = "2026-01-31"'
            )
    specials = tuple(
        SpecialToken(token.content, token.lstrip, token.rstrip) for token in encoder.special_tokens()
    )
    names = {"eos_token": encoder.eos_token, **_special_names(raw)}
    chat = Chat(conversations, templates, names, specials, config.train_on, today)
    _try(chat, tokenizer, where)
    return chat


def _try(chat: Chat, tokenizer: Tokenizer, where: str) -> None:
    try:
        rendered = chat.rendered([dict(message) for message in PROBE], None)
    except Cannot as error:
        hint = "; " + (
            'mark them in it, or train_on = "last" or "all"'
            if "{% generation %}" in str(error)
            else "name another by chat_template"
        )
        raise RecipeError(f"{where}: a plain conversation of two turns: {error}{hint}") from None
    if not tokenizer.chats.parses_as_whole(rendered):
        raise RecipeError(
            f"{where}: this tokenizer does not encode a conversation piece by piece, between special tokens, "
            "as it encodes the whole; use another tokenizer.json"
        )


def _read(file: Path, where: str) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{where}: chat_template: {file}: cannot be read: {error}") from None


def _read_config(file: Path, where: str) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        raw: Any = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise RecipeError(f"{where}: {file}: cannot be read: {error}") from None
    return cast("dict[str, Any]", raw) if isinstance(raw, dict) else {}


def _templates_in(raw: dict[str, Any]) -> dict[str, str]:
    """The templates of a tokenizer_config.json: one, or a list of them by name."""
    found: Any = raw.get("chat_template")
    if isinstance(found, str):
        return {"default": found}
    if isinstance(found, list):
        named = [cast("dict[str, Any]", t) for t in cast("list[Any]", found) if isinstance(t, dict)]
        return {str(t.get("name")): str(t.get("template")) for t in named}
    return {}


def _special_names(raw: dict[str, Any]) -> dict[str, str]:
    """The special tokens as transformers names them to a template: bos_token, eos_token, ..."""
    extra: Any = raw.get("extra_special_tokens")
    named: dict[str, Any] = {**raw, **(cast("dict[str, Any]", extra) if isinstance(extra, dict) else {})}
    found: dict[str, str] = {}
    for name, token in named.items():
        if isinstance(token, dict):  # an AddedToken written out
            token = cast("dict[str, Any]", token).get("content")
        if name.endswith("_token") and isinstance(token, str):
            found[name] = token
    return found


def _day(written: str | None, where: str) -> date | None:
    try:
        return None if written is None else date.fromisoformat(written)
    except ValueError:
        raise RecipeError(
            f'{where}: chat_date: found "{written}", expected a day, such as 2026-01-31'
        ) from None
