"""What is wrong with recipe, data or model is said in one message before anything is trained, and the
corrected recipe trains in the same run directory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from distributed.ranks import metrics, train_on

from flame import cli

COMMAND = [sys.executable, "-m", "flame"]


def message_of(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What a command that must fail says: one line, exit code 1."""
    capsys.readouterr()
    assert cli.run([str(a) for a in arguments]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    return checked(err)


def checked(err: str) -> str:
    assert err.startswith("flame: ")
    assert err.count("flame: ") == 1, err
    assert "Traceback" not in err
    return err


# --------------------------------------------------------------- before any process is started


@pytest.mark.parametrize(
    ("replaced", "says"),
    [
        ({"seed = 7": "sede = 7"}, ["run.sede", "did you mean seed?", "run.toml"]),
        ({"[optimizer]": "[optimiser]"}, ["optimiser", "did you mean optimizer?"]),
        ({"seed = 7": "seed = = 7"}, ["not valid TOML", "line 4"]),
        ({"seed = 7": 'seed = "seven"'}, ["run.seed", "seven", "a whole number"]),
        ({"tokens_per_step = 768": "tokens_per_step = 700"}, ["batch.tokens_per_step", "700", "640 or 704"]),
        ({"tokens_per_step = 768": "tokens_per_step = 32"}, ["batch.tokens_per_step", "such as 64"]),
        ({"steps = 6": ""}, ["run", "steps or tokens"]),
        ({"steps = 6": "steps = 6\ntokens = 700"}, ["run", "either steps or tokens"]),
        ({"steps = 6": "steps = -1"}, ["run.steps", "-1"]),
        ({'"5 steps"': '"5"'}, ["schedule.warmup", "with its unit"]),
        ({"[checkpoint]": "[parallel]\nshard = 3\n[checkpoint]"}, ["shard 3", "2", "--nproc 3"]),
        ({"tokens_per_step = 768": "tokens_per_step = 64"}, ["2 data-parallel ranks", "only 1 rows"]),
    ],
)
def test_a_wrong_recipe_is_refused_and_leaves_nothing_behind(
    write_recipe,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    replaced: dict[str, str],
    says: list[str],
) -> None:
    recipe = write_recipe(steps=6, replaced=replaced)
    message = message_of(capsys, "train", recipe, "--nproc", 2)
    for part in says:
        assert part in message
    assert not (tmp_path / "run").exists()


def test_a_layout_that_cannot_be_is_refused_from_flags_too(
    write_recipe, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    message = message_of(capsys, "train", write_recipe(), "--nproc", 2, "--parallel.shard", 3)
    assert "shard 3" in message
    assert "--nproc 3" in message
    assert "--nproc: found 0" in message_of(capsys, "train", write_recipe(), "--nproc", 0)
    assert not (tmp_path / "run").exists()


def test_a_recipe_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["train"], ["data", "preview"]):
        missing = tmp_path / "missing.toml"
        assert f"{missing}: no such recipe" in message_of(capsys, *command, missing)
        assert f"{tmp_path}: cannot be read" in message_of(capsys, *command, tmp_path)


@pytest.mark.parametrize(
    "arguments",
    [
        ["status"],
        ["resume"],
        ["report"],
        ["export", "--to", "exported"],
        ["generate", "-p", "def"],
    ],
    ids=lambda a: a[0],
)
@pytest.mark.parametrize("exists", [True, False])
def test_a_directory_that_is_no_run_is_named_and_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], exists: bool
) -> None:
    folder = tmp_path / "not-a-run"
    if exists:
        folder.mkdir()
    command, *options = arguments
    message = message_of(capsys, command, folder, *options)
    assert str(folder) in message
    assert list(tmp_path.rglob("*")) == ([folder] if exists else [])


def test_a_run_without_a_checkpoint_cannot_be_exported_or_generate(
    write_recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.toml").write_text(write_recipe().read_text())
    for arguments in (["export", run, "--to", tmp_path / "to"], ["generate", run, "-p", "def"]):
        assert "no checkpoint yet" in message_of(capsys, *arguments)
    assert not (tmp_path / "to").exists()


def test_a_record_that_was_damaged_is_named_with_its_line(
    write_recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "recipe.toml").write_text(write_recipe().read_text())
    (run / "events.jsonl").write_text('{"event": "start"}\n{"event": "st\n{"event": "done"}\n')
    assert "events.jsonl: line 2" in message_of(capsys, "status", run)


# -------------------------------------------------------------------- what only the ranks find


def missing_file(recipe: Path, folder: Path) -> Callable[[], None]:
    there = folder / "data.jsonl"
    there.rename(folder / "moved.jsonl")
    return lambda: (folder / "moved.jsonl").rename(there) and None


def no_such_field(recipe: Path, folder: Path) -> Callable[[], None]:
    text = recipe.read_text()
    recipe.write_text(text.replace('name = "python"', 'name = "python"\ntext = "body"'))
    return lambda: recipe.write_text(text) and None


def empty_file(recipe: Path, folder: Path) -> Callable[[], None]:
    content = (folder / "data.jsonl").read_bytes()
    (folder / "data.jsonl").write_bytes(b"")
    return lambda: (folder / "data.jsonl").write_bytes(content) and None


def unreadable_tokenizer(recipe: Path, folder: Path) -> Callable[[], None]:
    text = recipe.read_text()
    (folder / "tokenizer.json").write_text('{"model": ')
    at = text.index('path = "') + len('path = "')
    recipe.write_text(f"{text[:at]}{folder / 'tokenizer.json'}{text[text.index(chr(34), at) :]}")
    return lambda: recipe.write_text(text) and None


def config_with(**changes: object) -> Callable[[Path, Path], Callable[[], None]]:
    def break_config(recipe: Path, folder: Path) -> Callable[[], None]:
        config = next(folder.glob("gla.json"))
        text = config.read_text()
        config.write_text(json.dumps(json.loads(text) | changes))
        return lambda: config.write_text(text) and None

    return break_config


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (missing_file, ["data.jsonl", "no such file", 'source "python"']),
        (no_such_field, ['no text field "body"', "found: text", "set text ="]),
        (empty_file, ["data.jsonl: the file is empty", "remove it"]),
        (unreadable_tokenizer, ["tokenizer.json", "cannot be read as a tokenizer"]),
        (config_with(vocab_size=300), ["vocab_size is 300", "384 ids", "raise it"]),
        (config_with(model_type="glaa"), ['unknown model_type "glaa"', "did you mean gla?"]),
        (config_with(num_heads=5), ["gla.json", "cannot be built"]),
    ],
    ids=["file", "field", "empty", "tokenizer", "vocabulary", "model_type", "build"],
)
def test_ranks_refuse_what_they_cannot_train_and_once_corrected_they_train(
    write_recipe,
    text_folder: Path,
    tmp_path: Path,
    break_it: Callable[[Path, Path], Callable[[], None]],
    says: list[str],
) -> None:
    (tmp_path / "data.jsonl").write_bytes((text_folder / "text.jsonl").read_bytes())
    data = {str(text_folder / "text.jsonl"): str(tmp_path / "data.jsonl")}
    recipe, run = write_recipe(steps=6, replaced=data), tmp_path / "run"

    mend = break_it(recipe, tmp_path)
    ranks = train_on(2, recipe)
    assert ranks.codes() == [1, 1]
    message = ranks.error()
    assert message == ranks.error(), "every rank stops for the same reason"
    for part in says:
        assert part in message
    assert metrics(run) == []
    assert not (run / "checkpoints").exists()

    mend()
    assert train_on(1, recipe).codes() == [0]
    assert [r["step"] for r in metrics(run)] == [1, 2, 3, 4, 5, 6]


def test_another_recipes_run_is_refused_with_the_field_and_left_as_it_is(
    write_recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, run = write_recipe(steps=6), tmp_path / "run"
    assert train_on(1, recipe).codes() == [0]
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    other = write_recipe(steps=7, replaced={"learning_rate = 3e-3": "learning_rate = 1e-3"})
    message = message_of(capsys, "train", other)
    for part in ("another recipe's run", "optimizer.learning_rate", "0.003", "0.001", "run.directory"):
        assert part in message
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
    assert train_on(1, write_recipe(steps=7)).codes() == [0], "a longer run is the same run"


def test_the_message_of_a_rank_arrives_through_the_supervisor_alone(write_recipe, text_folder: Path) -> None:
    missing = str(text_folder / "missing.jsonl")
    recipe = write_recipe(replaced={str(text_folder / "text.jsonl"): missing})
    done = subprocess.run(
        [*COMMAND, "train", str(recipe), "--nproc", "2"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert missing in checked(done.stderr)
    assert done.stderr.count("\n") == 1
