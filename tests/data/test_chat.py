"""Conversations: rendered as transformers renders them, special tokens only from the template, and the loss
on the assistant's words."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from data.chats import (
    CHATML,
    FORGETFUL,
    INST,
    MARKED,
    SPECIALS,
    TEMPLATES,
    TOOLS,
    open_chat,
    said,
    tokens_of,
    write_tokenizer,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from flame.batch import IGNORED
from flame.data.catalog import open_catalog
from flame.data.chat import Chat
from flame.data.config import DataConfig, SourceConfig, TokenizerConfig
from flame.data.formats import Bad
from flame.data.loader import Loader
from flame.data.plan import DataPlan
from flame.data.shapes import shape_of
from flame.data.tokens import Tokenizer, load_tokenizer
from flame.errors import RecipeError

BESIDE = (
    "{% for m in messages %}{{ '<|im_start|>' + (m.name or '') + m.content }}"
    "{{ '<|im_end|>' * (m.role == 'assistant') }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>' }}{% endif %}"
)
Opener = Callable[..., tuple[Chat, Tokenizer]]
CLEAN = st.text(st.sampled_from("ab Ü東🔥.\n\t0'’-,"), max_size=30)
SPELLED = st.lists(
    st.sampled_from(
        [*SPECIALS, "<|eos|>", "<|", "|>", "im_end", "im_start|>", "<", ">", "[", "]", " a\n", "<think>"]
    ),
    max_size=8,
).map("".join)


@pytest.fixture(scope="module")
def opener(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Opener:
    """`opener("chatml", eos=..., train_on=...)`: a source's chat and its tokenizer."""
    known: dict[str, Path] = {}

    def open_it(template: str, eos: str = "<|eos|>", **options: Any) -> tuple[Chat, Tokenizer]:
        key = f"{template}/{eos}"
        if key not in known:
            directory = tmp_path_factory.mktemp("chat") / "tok"
            known[key] = write_tokenizer(folder / "tok", directory, TEMPLATES.get(template, template), eos)
        return open_chat(known[key], **options)

    open_it.known = known  # type: ignore[attr-defined]
    return open_it


@cache
def library(opener: Opener, template: str) -> Any:
    """The same tokenizer in transformers."""
    known: dict[str, Path] = opener.known  # type: ignore[attr-defined]
    return AutoTokenizer.from_pretrained(known[f"{template}/<|eos|>"])


# ------------------------------------------------------------------- as transformers renders


@pytest.mark.parametrize("template", TEMPLATES)
@settings(max_examples=60, deadline=None)
@given(turns=st.lists(CLEAN, min_size=2, max_size=6))
def test_ids_are_those_of_transformers(opener: Opener, template: str, turns: list[str]) -> None:
    chat, tokenizer = opener(template)
    theirs = library(opener, template)
    messages = said(*turns)
    expected = theirs.apply_chat_template(messages)["input_ids"]
    ids, _ = tokens_of(chat, tokenizer, messages)
    assert ids == [*expected, tokenizer.eos_id]


@settings(max_examples=60, deadline=None)
@given(turns=st.lists(CLEAN, min_size=2, max_size=6))
def test_what_the_template_marks_has_the_loss_as_with_transformers(opener: Opener, turns: list[str]) -> None:
    chat, tokenizer = opener("marked")
    theirs = library(opener, "marked")
    messages = said(*turns)
    expected = theirs.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True, tokenize=True
    )
    _, trained = tokens_of(chat, tokenizer, messages)
    assert trained == [*map(bool, expected["assistant_masks"]), False]


def test_a_token_that_lies_partly_in_the_models_words_has_the_loss(opener: Opener) -> None:
    template = MARKED.replace("<|im_start|>assistant\n", "<|im_start|> to")
    chat, tokenizer = opener(template)
    ids, trained = tokens_of(chat, tokenizer, said("a", "kens of rows"))
    expected = library(opener, template).apply_chat_template(
        said("a", "kens of rows"), return_dict=True, return_assistant_tokens_mask=True
    )
    first = trained.index(True)
    assert tokenizer.chats.token_of(ids[first]) == "Ġtokens"
    assert trained[:-1] == [*map(bool, expected["assistant_masks"])]


def test_tools_and_calls_are_rendered_as_by_transformers(opener: Opener) -> None:
    chat, tokenizer = opener("tools")
    theirs = library(opener, "tools")
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    call = {"type": "function", "function": {"name": "f", "arguments": {"a": 1, "ü": "<&>"}}}
    messages = [
        {"role": "system", "content": "be"},
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": "three"},
    ]
    expected = theirs.apply_chat_template(messages, tools=tools)["input_ids"]
    ids, trained = tokens_of(chat, tokenizer, messages, tools=tools)
    assert ids == [*expected, tokenizer.eos_id]
    assert spoken(chat, messages, tools=tools) == [
        '{"name": "f", "arguments": {"a": 1, "ü": "<&>"}}<|im_end|>',
        "three<|im_end|>",
    ]
    as_text = '[{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]'
    assert tokens_of(chat, tokenizer, messages, tools=as_text) == (ids, trained)


# ------------------------------------------------------------------- what spells a special token


@pytest.mark.parametrize("template", TEMPLATES)
@settings(max_examples=150, deadline=None)
@given(turns=st.lists(SPELLED, min_size=2, max_size=5))
def test_special_tokens_come_from_the_template_alone(opener: Opener, template: str, turns: list[str]) -> None:
    chat, tokenizer = opener(template)
    own = {tokenizer.chats.id_of(token) for token in [*SPECIALS, "<|eos|>"]}
    ids, trained = tokens_of(chat, tokenizer, said(*turns))
    plainly, _ = tokens_of(chat, tokenizer, said(*("x" for _ in turns)))
    assert [i for i in ids if i in own] == [i for i in plainly if i in own]
    rendered = chat.text({"messages": said(*turns)})
    assert tokenizer.chats._first.decode(ids[:-1], skip_special_tokens=False) == rendered
    assert any(trained)


@settings(max_examples=100, deadline=None)
@given(name=SPELLED, content=SPELLED)
def test_strings_side_by_side_spell_no_special_token(opener: Opener, name: str, content: str) -> None:
    chat, tokenizer = opener(BESIDE)
    for a, b in ((name, content), ("<|im_", "end|>"), ("<", "/s>"), ("x[INS", "T]")):
        messages = [{"role": "user", "name": a, "content": b}, *said("", "x")[1:]]
        ids, _ = tokens_of(chat, tokenizer, messages)
        assert [token for token in map(tokenizer.chats.token_of, ids[:-1]) if token in SPECIALS] == [
            "<|im_start|>",
            "<|im_start|>",
            "<|im_end|>",
        ]


def test_the_library_alone_would_parse_what_a_user_spells(opener: Opener) -> None:
    """The control of the test above."""
    chat, tokenizer = opener("chatml")
    ids, _ = tokens_of(chat, tokenizer, said("a <|im_end|>", "b"))
    naive = tokenizer.chats._first
    rendered = str(chat.text({"messages": said("a <|im_end|>", "b")}))
    naive.encode_special_tokens = False
    try:
        parsed = naive.encode(rendered, add_special_tokens=False).ids
    finally:
        naive.encode_special_tokens = True
    end = naive.token_to_id("<|im_end|>")
    assert (parsed.count(end), ids.count(end)) == (3, 2)


# ---------------------------------------------------------------------------------- the loss


def spoken(chat: Chat, messages: Any, **fields: Any) -> list[str]:
    """The text that has the loss."""
    rendered = chat.text({"messages": messages, **fields})
    assert not isinstance(rendered, Bad), rendered.reason
    return [str(rendered)[start:end] for start, end in rendered.trained]


def test_the_loss_is_on_the_assistants_words_and_what_ends_its_turn(opener: Opener) -> None:
    messages = [{"role": "system", "content": "s"}, *said("a", " b\n", "c", "d")]
    for template in ("chatml", "marked", "tools"):
        chat, _ = opener(template)
        assert spoken(chat, messages) == [" b\n<|im_end|>", "d<|im_end|>"]
    assert spoken(opener("inst")[0], messages[1:]) == [" " + " b\n</s>", " d</s>"]
    assert spoken(opener("chatml", train_on="last")[0], messages) == ["d<|im_end|>"]
    assert spoken(opener("marked", train_on="last")[0], messages) == ["d<|im_end|>"]
    (everything,) = spoken(opener("chatml", train_on="all")[0], messages)
    assert everything.startswith("<|im_start|>system\ns") and everything.endswith("d<|im_end|>\n")
    unweighted = [*messages[:2], {**messages[2], "weight": 0}, *messages[3:]]
    for template in ("chatml", "marked"):
        assert spoken(opener(template)[0], unweighted) == ["d<|im_end|>"]


def test_a_template_that_forgets_is_refused_unless_one_turn_is_trained(opener: Opener) -> None:
    with pytest.raises(RecipeError, match=r"marks no \{% generation %\}.*train_on = \"last\" or \"all\""):
        opener(FORGETFUL)
    chat, _ = opener(FORGETFUL, train_on="last")
    assert spoken(chat, said("a", "b", "c", "d")) == ["<think>\n\n</think>\n\nd<|im_end|>"]


def test_a_conversation_ends_with_eos_once(opener: Opener) -> None:
    turns = said("a", "b")
    for template, eos, appended in (
        ("chatml", "<|eos|>", True),  # behind "<|im_end|>\n", where the model says nothing
        ("chatml", "<|im_end|>", False),  # the template's own, without the line end behind it
        ("inst", "</s>", False),
    ):
        chat, tokenizer = opener(template, eos)
        ids, trained = tokens_of(chat, tokenizer, turns)
        assert ids[-1] == tokenizer.eos_id
        assert ids[-2] != tokenizer.eos_id
        assert trained[-1] is not appended
    bare = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' * (m.role == 'user') }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    chat, tokenizer = opener(bare, train_on="last")
    _, trained = tokens_of(chat, tokenizer, turns)
    assert trained[-1], "EOS is what ends the turn"


def test_bos_begins_a_conversation_once(opener: Opener) -> None:
    for template in ("inst", "chatml"):
        chat, tokenizer = opener(template, bos=True)
        ids, trained = tokens_of(chat, tokenizer, said("a", "b"))
        assert ids[0] == tokenizer.bos_id
        assert ids.count(ids[0]) == 1
        assert not trained[0]


# ------------------------------------------------------------------------------- the records


def test_sharegpt_conversations_are_those_of_openai(opener: Opener) -> None:
    chat, _ = opener("tools")
    theirs = [("system", "s"), ("human", "a"), ("gpt", "b"), ("observation", "c"), ("gpt", "d")]
    ours = [("system", "s"), ("user", "a"), ("assistant", "b"), ("tool", "c"), ("assistant", "d")]
    one = chat.text({"messages": [{"from": who, "value": what} for who, what in theirs]})
    other = chat.text({"messages": [{"role": who, "content": what} for who, what in ours]})
    assert one == other
    assert not isinstance(one, Bad)


INSTRUCTIONS = {"prompt": "{instruction}\n\n{input}", "completion": "{output}"}


def test_a_prompt_and_its_completion_are_a_conversation_of_two_turns(opener: Opener) -> None:
    pairs, tokenizer = opener("chatml", **INSTRUCTIONS)
    chat, _ = opener("chatml")
    for more, asked in (("2 and 2 <|im_end|>", "Add.\n\n2 and 2 <|im_end|>"), ("", "Add.")):
        made = pairs.text({"instruction": "Add.", "input": more, "output": " 4\n", "tools": None})
        assert not isinstance(made, Bad), made.reason
        assert made == chat.text({"messages": said(asked, "4")})
    (signed,) = tokenizer.encode([made])
    trained = [int(i) for i in signed if i >= 0]
    assert tokenizer.decode(trained).startswith("4")
    assert set(pairs.columns) == {"instruction", "input", "output"}


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"instruction": "a", "input": ""}, 'completion: no field "output"'),
        ({"instruction": "a", "input": None, "output": "b"}, 'prompt: field "input" is null'),
        ({"instruction": " ", "input": "\n", "output": "b"}, "prompt: empty text"),
        ({"instruction": "a", "input": "", "output": " \n"}, "completion: empty text"),
        ({"instruction": "a", "input": "", "output": 4}, 'completion: field "output" is no string'),
    ],
)
def test_records_without_prompt_or_completion_say_why(
    opener: Opener, record: dict[str, Any], reason: str
) -> None:
    found = opener("chatml", **INSTRUCTIONS)[0].text(record)
    assert isinstance(found, Bad)
    assert reason in found.reason


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"prompt": "{a}"}, "prompt and completion need each other"),
        ({"completion": "{a}"}, "prompt and completion need each other"),
        ({"prompt": "{a}", "completion": "{b}", "chat": "messages"}, "chat and prompt exclude each other"),
        ({"prompt": "a", "completion": "{b}"}, "prompt: names no field"),
        ({"prompt": "{a}", "completion": "{b:>3}"}, "completion: found a field written"),
        ({"train_on": "last"}, 'set chat = "messages", or prompt and completion'),
    ],
)
def test_settings_of_prompts_that_do_not_fit_are_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(reason)):
        shape_of(SourceConfig("c", ["x"], **settings), Path())


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_instructions_in_files_are_rows_with_a_loss_on_the_answers(
    folder: Path, tmp_path: Path, form: str
) -> None:
    records = [
        {"id": i, "instruction": f"Say {i}.", "input": "twice" * (i % 2), "output": f"({i}={i})"}
        for i in range(40)
    ]
    if form == "jsonl":
        (tmp_path / "x.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "x.parquet")
    write_tokenizer(folder / "tok", tmp_path / "tok", TEMPLATES["chatml"], "<|eos|>")
    source = SourceConfig("c", [str(tmp_path / f"x.{form}")], **INSTRUCTIONS)
    config = DataConfig([source], 64, lanes=1)
    plan = DataPlan.of(config, 256, 0)
    catalog = open_catalog(config, TokenizerConfig(str(tmp_path / "tok")), plan, tmp_path)
    tokenizer = catalog.load_tokenizer()
    with Loader(catalog, plan, 0, 1, 4) as loader:
        batch = loader.next_step().micro_batches[0]
    labels = batch.labels[batch.labels != IGNORED].tolist()
    words = re.findall(r"\((\d+)=(\d+)\)", tokenizer.decode(labels))
    assert len(words) >= 4
    assert all(first == second for first, second in words)
    assert "Say" not in tokenizer.decode(labels)


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({}, 'no field "messages"'),
        ({"messages": None}, 'field "messages" is null'),
        ({"messages": "hello"}, "no list of messages"),
        ({"messages": []}, "without messages"),
        ({"messages": ["a"]}, "message 0 is no object"),
        ({"messages": [{"content": "a"}]}, "message 0 has no role"),
        ({"messages": [{"role": "user"}]}, "message 0 has no content"),
        ({"messages": [{"role": "user", "content": 3}]}, "message 0 has no content"),
        ({"messages": [{"from": "alien", "value": "a"}]}, 'from "alien", who is not known'),
        ({"messages": said("a")}, "no turn of the assistant"),
        ({"messages": said("a", "\ufdd0")}, r"U\+FDD0"),
        ({"messages": [*said("a", "b"), {"role": "system", "content": "c"}]}, "refuses it: only user and"),
        ({"messages": said("a", "b"), "tools": "{"}, "not JSON"),
    ],
)
def test_records_without_a_conversation_say_why(opener: Opener, record: dict[str, Any], reason: str) -> None:
    found = opener("inst")[0].text(record)
    assert isinstance(found, Bad)
    assert re.search(reason, found.reason), found.reason


# ----------------------------------------------------------------------------- the settings


def test_templates_that_cannot_be_used_are_refused_with_the_reason(folder: Path, tmp_path: Path) -> None:
    directory = write_tokenizer(folder / "tok", tmp_path / "tok", None)
    with pytest.raises(RecipeError, match=r"has no chat template.*chat_template = \"file.jinja\""):
        open_chat(directory)
    with pytest.raises(RecipeError, match=r"none\.jinja: cannot be read"):
        open_chat(directory, chat_template="none.jinja")
    own = directory / "own.jinja"
    own.write_text("{% for %}")
    with pytest.raises(RecipeError, match="no Jinja"):
        open_chat(directory, chat_template="own.jinja")
    own.write_text(CHATML + "{{ strftime_now('%Y') }}")
    with pytest.raises(RecipeError, match=r"writes the date.*chat_date"):
        open_chat(directory, chat_template="own.jinja")
    with pytest.raises(RecipeError, match="expected a day"):
        open_chat(directory, chat_template="own.jinja", chat_date="today")
    own.write_text("{{ strftime_now('%Y') }}" + CHATML)
    chat, _ = open_chat(directory, chat_template="own.jinja", chat_date="2024-07-26")
    assert str(chat.text({"messages": said("a", "b")})).startswith("2024<|im_start|>")
    (directory / "chat_template.jinja").write_text(MARKED)
    assert open_chat(directory)[0].templates == {"default": MARKED}
    own.write_text(INST)
    assert open_chat(directory, chat_template="own.jinja")[0].templates == {"default": INST}
    with pytest.raises(RecipeError, match="exclude each other"):
        open_chat(directory, text="text")
    with pytest.raises(RecipeError, match=r"needs a tokenizer with a tokenizer\.json"):
        load_tokenizer("bytes", False).chats  # noqa: B018


def test_the_fingerprint_knows_template_and_settings(opener: Opener) -> None:
    made = [opener("chatml"), opener("marked"), opener("chatml", train_on="all"), opener(TOOLS)]
    prints = [str(chat.identity()) for chat, _ in made]
    assert len(set(prints)) == 4
    assert opener("chatml")[0].identity() == opener("chatml")[0].identity()
