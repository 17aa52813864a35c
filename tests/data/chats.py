"""Chat templates of the common kinds, and a small tokenizer with their special tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers

from flame.data.chat import Chat
from flame.data.config import SourceConfig
from flame.data.formats import Bad
from flame.data.shapes import shape_of
from flame.data.tokens import Tokenizer, load_tokenizer

SPECIALS = ["<|im_start|>", "<|im_end|>", "<s>", "</s>", "[INST]", "[/INST]", "<|eot|>"]
CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = """{%- for m in messages %}
    {%- if m.role == 'assistant' %}
        {{- '<|im_start|>assistant\n' }}{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{{ '\n' }}
    {%- else %}
        {{- '<|im_start|>' + m.role + '\n' + m.content | trim + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}"""
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + '</s>' }}"
    "{% else %}{{ raise_exception('only user and assistant') }}{% endif %}{% endfor %}"
)
TOOLS = """{{- bos_token }}
{%- if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\n' }}
    {%- if m.tool_calls %}{% for call in m.tool_calls %}{{ call.function | tojson }}{% endfor %}
    {%- else %}{{ m.content }}{% endif %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
# forgets the thoughts of all turns but the last, as reasoning models' templates do
FORGETFUL = """{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\n' }}
    {%- if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}
    {{- m.content + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
TEMPLATES = {"chatml": CHATML, "marked": MARKED, "inst": INST, "tools": TOOLS}


def write_tokenizer(plain: Path, directory: Path, template: str | None, eos: str = "<|eos|>") -> Path:
    """A copy of a tokenizer with special tokens of chat templates, and a template."""
    inner = tokenizers.Tokenizer.from_file(str(plain / "tokenizer.json"))
    inner.add_special_tokens(SPECIALS)
    inner.add_tokens(["<think>", "</think>"])
    directory.mkdir(parents=True, exist_ok=True)
    inner.save(str(directory / "tokenizer.json"))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": eos,
        "bos_token": "<s>",
        "clean_up_tokenization_spaces": False,
    }
    if template is not None:
        config["chat_template"] = template
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def open_chat(directory: Path, bos: bool = False, **settings: Any) -> tuple[Chat, Tokenizer]:
    tokenizer = load_tokenizer(directory, bos)
    if "prompt" not in settings:
        settings["chat"] = "messages"
    config = SourceConfig("c", ["x"], **settings)
    chat = shape_of(config, directory, directory, tokenizer)
    assert isinstance(chat, Chat)
    return chat, tokenizer


def said(*turns: str) -> list[dict[str, str]]:
    """Turns of user and assistant, one after the other."""
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


def tokens_of(chat: Chat, tokenizer: Tokenizer, messages: Any, **fields: Any) -> tuple[list[int], list[bool]]:
    """The ids of a conversation, and which of them have a loss."""
    rendered = chat.text({"messages": messages, **fields})
    assert not isinstance(rendered, Bad), rendered.reason
    (signed,) = tokenizer.encode([rendered])
    return [i if i >= 0 else ~i for i in signed.tolist()], (signed >= 0).tolist()
