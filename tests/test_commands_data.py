"""Commands that look at a recipe's data as a whole."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from test_commands import output

from flame import cli
from flame.data.tokens import load_tokenizer


def test_a_tokenizer_is_trained_on_the_recipes_data_and_never_replaced(
    write_recipe, tmp_path: Path, capsys
) -> None:
    recipe, target = write_recipe(), tmp_path / "made"
    ask = ["tokenizer", "train", recipe, "--vocabulary", "500", "--tokenizer.path", target]
    out = output(capsys, *ask)
    assert "500 tokens, from 60 documents" in out
    assert 1.5 < float(out.splitlines()[1].split()[0]) < 6
    assert load_tokenizer(target, bos=False).vocab_size == 500
    made = (target / "tokenizer.json").read_bytes()
    assert cli.run([str(word) for word in ask]) == 1
    assert "exists" in capsys.readouterr().err
    assert (target / "tokenizer.json").read_bytes() == made
    again = [*ask[:-1], tmp_path / "again" / "tokenizer.json"]
    output(capsys, *again)
    assert (tmp_path / "again" / "tokenizer.json").read_bytes() == made, "the same data, the same tokenizer"


@pytest.mark.parametrize("option", [["--vocabulary", "200"], ["--characters", "x"], ["--characters", "0"]])
def test_a_tokenizer_that_cannot_be_is_refused(write_recipe, tmp_path: Path, capsys, option) -> None:
    target = tmp_path / "made"
    assert cli.run(["tokenizer", "train", str(write_recipe()), "--tokenizer.path", str(target), *option]) == 1
    assert capsys.readouterr().err.startswith("flame: ")
    assert not target.exists()


def test_check_reports_the_data_as_tables_and_json(write_recipe, text_folder: Path, capsys) -> None:
    recipe = write_recipe()
    found = json.loads(output(capsys, "data", "check", recipe, "--json", "--processes", 1))
    (source,) = found["sources"]
    assert (source["name"], source["documents"], source["bad"]) == ("python", 60, 0)
    assert sum(source["lengths"].values()) == 60
    assert found["epoch_steps"] == source["tokens"] / 768
    shown = output(capsys, "data", "check", recipe, "--processes", 1)
    assert f"{source['tokens']:,}" in shown
    assert f"every source is read once after {found['epoch_steps']:,.1f} steps" in shown


def test_check_fails_where_a_source_holds_no_text(write_recipe, tmp_path: Path, capsys) -> None:
    lines = [{"text": None}] * 20
    (tmp_path / "none.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    replaced = {"[batch]": f'[[data.sources]]\nname = "none"\nfiles = "{tmp_path / "none.jsonl"}"\n[batch]'}
    recipe = write_recipe(replaced=replaced)
    assert cli.run(["data", "check", str(recipe), "--processes", "1"]) == 1
    out, err = capsys.readouterr()
    assert 'flame: source "none": no valid record' in err
    assert "none.jsonl, line 1:" in out


def test_bench_measures_loader_and_tokenizer_on_the_same_text(write_recipe, capsys) -> None:
    recipe = write_recipe()
    ask = ["data", "bench", recipe, "--seconds", "0.5"]
    found = json.loads(output(capsys, *ask, "--json", "--ranks", 2))
    assert found["ranks"] == 2
    assert found["tokens"] == found["steps"] * 768 / 2
    assert 0 < found["share_of_tokenizer"] < 1.5
    assert 0 < found["resumed_step"] <= found["steps"]
    assert min(found[name] for name in found if name not in ("cpu_share", "padding_share")) > 0
    assert "% of the tokenizer's speed" in output(capsys, *ask)


def test_data_commands_take_token_ids(write_recipe, text_folder: Path, tmp_path: Path, capsys) -> None:
    texts = [json.loads(line)["text"] for line in (text_folder / "text.jsonl").read_text().splitlines()]
    whole = load_tokenizer(text_folder / "tokenizer", False).encode(texts)
    np.concatenate(whole).astype("<u2").tofile(tmp_path / "t.bin")
    ids = f'"{tmp_path}/t.bin"\nids = true\nids_dtype = "uint16"'
    recipe = write_recipe(replaced={f'"{text_folder}/text.jsonl"': ids})
    found = json.loads(output(capsys, "data", "check", recipe, "--json", "--processes", 1))["sources"][0]
    of_text = json.loads(output(capsys, "data", "check", write_recipe("t"), "--json", "--processes", 1))
    assert found | {"characters": 0} == found
    assert found["documents"] == len(texts)
    for name in ("tokens", "lengths", "duplicates", "over_length", "epoch_steps"):
        assert found[name] == of_text["sources"][0][name]
    lines = output(capsys, "data", "preview", recipe, "--steps", "0:30", "--json").splitlines()
    rows = [row for line in lines for row in json.loads(line)["rows"]]
    assert len(rows) == 30 * 12
    assert {segment[2].partition(":")[0] for row in rows for segment in row} == {"t.bin"}
    ask = ["data", "bench", recipe, "--seconds", "0.2"]
    assert json.loads(output(capsys, *ask, "--json"))["share_of_tokenizer"] is None
    assert "a source holds token ids" in output(capsys, *ask)
    assert cli.run(["tokenizer", "train", str(recipe), "--tokenizer.path", str(tmp_path / "new")]) == 1
    assert "every source holds token ids" in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--ranks", "0"], ["--seconds", "0"], ["--ranks", "13"]])
def test_bench_refuses_what_it_cannot_measure(write_recipe, capsys, option) -> None:
    assert cli.run(["data", "bench", str(write_recipe()), *option]) == 1
    assert capsys.readouterr().err.startswith("flame: ")
