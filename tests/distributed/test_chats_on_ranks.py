"""Conversations in padded rows, trained: the same on other ranks, through a kill and a stop."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from data.chats import CHATML, said, write_tokenizer
from distributed.ranks import metrics, train_on, wait_for_step

from flame import cli

EXACT = ("step", "tokens", "epoch", "documents", "padding_share", "rows_digest", "sources")
LONG = 40  # the conversation in this line is longer than a row


@pytest.fixture
def replaced(text_folder: Path, tmp_path: Path) -> dict[str, str]:
    """Changes of the recipe: conversations of which one in forty is bad, and whole documents."""
    lines = [{"messages": said(f"say {i} <|im_end|>", "word " * (i % 9 + 1), "?", "no")} for i in range(120)]
    lines[LONG] = {"messages": said("long", "word " * 200)}
    lines[7] = {"messages": [{"role": "user", "content": None}]}
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokenizer = write_tokenizer(text_folder / "tokenizer", tmp_path / "tok", CHATML)
    return {
        f'path = "{text_folder / "tokenizer"}"': f'path = "{tokenizer}"',
        f'files = "{text_folder / "text.jsonl"}"': f'files = "{tmp_path / "chats.jsonl"}"\nchat = "messages"',
        "sequence_length = 64": 'sequence_length = 128\npacking = "document"\noverlong = "skip"',
    }


def larger(model: Path) -> None:
    config = json.loads(model.read_text())
    model.write_text(json.dumps(config | {"vocab_size": 400}))


def test_conversations_train_the_same_on_other_ranks(write_recipe, tmp_path: Path, replaced) -> None:
    one, recipe = (write_recipe(name, "llama", replaced=replaced) for name in ("one", "run"))
    larger(tmp_path / "llama.json")
    assert train_on(1, one).codes() == [0]
    for ranks, stop_at in ((2, 6), (3, 15)):
        trainer = train_on(ranks, recipe)
        wait_for_step(tmp_path / "run", stop_at)
        trainer.signal(signal.SIGKILL if ranks == 2 else signal.SIGTERM)
        trainer.codes()
    assert train_on(2, recipe).codes() == [0, 0]
    expected, got = metrics(tmp_path / "one"), metrics(tmp_path / "run")
    assert [[r[k] for k in EXACT] for r in got] == [[r[k] for k in EXACT] for r in expected]
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(expected, got, strict=True)) < 1e-6
    assert expected[-1]["loss"] < expected[0]["loss"] - 1
    source = expected[-1]["sources"]["python"]
    assert source["overlong"] > 0 and source["skipped"] > 0
    named = (tmp_path / "run" / "logs" / "skipped-records.jsonl").read_text().splitlines()
    assert {json.loads(line)["place"] for line in named} == {f"line {LONG + 1}", "line 8"}


def test_a_recipe_without_a_template_ends_before_the_first_step(
    write_recipe, tmp_path: Path, replaced, capsys
) -> None:
    recipe = write_recipe("run", "llama", replaced=replaced)
    config = tmp_path / "tok" / "tokenizer_config.json"
    config.write_text(json.dumps({"eos_token": "<|eos|>"}))
    for command in ("train", "data preview", "data check"):
        assert cli.run([*command.split(), str(recipe)]) == 1
        assert "has no chat template" in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
