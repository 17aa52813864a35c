"""The command line: help at once, flags as they are spelled, and usage errors that name the nearest."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from dataclasses import MISSING
from pathlib import Path

import pytest

import flame
from flame import cli
from flame.recipe import Recipe, read_recipe
from flame.schema import leaves, shown

LEAVES = [leaf for leaf in leaves(Recipe) if "[]" not in leaf.path]
HEAVY = ("torch", "transformers", "fla", "numpy", "tokenizers", "rich")


def usage_error(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as left:
        cli.run(arguments)
    assert left.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    return err


def flags_of(*flags: str) -> dict[str, str]:
    return cli.recipe_flags(cli.make_parser().parse_args(["train", "recipe.toml", *flags]))


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["--version"]])
def test_help_answers_in_under_a_second_without_torch(arguments: list[str]) -> None:
    code = (
        "import sys, atexit; from flame.cli import main\n"
        f"atexit.register(lambda: print([m for m in {HEAVY} if m in sys.modules], file=sys.stderr))\n"
        f"sys.argv[1:] = {arguments}; main()"
    )
    seconds: list[float] = []
    for _ in range(3):
        began = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - began)
        assert done.stderr.strip() == "[]", f"imported: {done.stderr}"
        assert "flame" in done.stdout
    assert min(seconds) < 1


def test_what_ranks_are_forked_from_imports_nothing_that_touches_a_gpu() -> None:
    code = (
        "import importlib, sys; from flame.commands.train import WARM\n"
        "for name in WARM: importlib.import_module(name)\n"
        "print([name for name in ('fla', 'triton', 'torch._dynamo') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def test_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        cli.run(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"flame {flame.__version__}\n"


@pytest.mark.parametrize("command", [["train"], ["resume"], ["data", "preview"]])
def test_help_shows_every_field_of_the_recipe_with_its_default(
    command: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "1000")  # one line a field
    with pytest.raises(SystemExit) as left:
        cli.run([*command, "--help"])
    assert left.value.code == 0
    entries = re.split(r"\n\s+(?=--)", capsys.readouterr().out)
    assert len(LEAVES) > 30
    for leaf in LEAVES:
        entry = next(e for e in entries if e.startswith(f"--{leaf.path} "))
        default = "(required)" if leaf.default is MISSING else f"(default: {shown(leaf.default)})"
        assert leaf.help in entry, leaf.path
        assert default in entry, leaf.path


@pytest.mark.parametrize(
    "flags",
    [
        ["--batch.micro_batch_rows", "2"],
        ["--batch.micro_batch_rows=2"],
        ["--batch.micro-batch-rows", "2"],
        ["--batch.micro-batch-rows=2"],
    ],
)
def test_flags_take_either_spelling(flags: list[str], write_recipe) -> None:
    given = flags_of(*flags)
    assert given == {"batch.micro_batch_rows": "2"}
    assert read_recipe(write_recipe(), given).batch.micro_batch_rows == 2


def test_flags_go_over_the_file_and_leave_the_rest(write_recipe) -> None:
    path = write_recipe(steps=30)
    recipe = read_recipe(path, flags_of("--run.steps=99", "--schedule.decay", "linear"))
    assert (recipe.run.steps, recipe.schedule.decay) == (99, "linear")
    assert (recipe.run.seed, recipe.schedule.warmup.amount) == (7, 5)


def test_a_boolean_flag_alone_means_true() -> None:
    assert flags_of("--tokenizer.bos") == {"tokenizer.bos": "true"}
    assert flags_of("--logging.tensorboard=false") == {"logging.tensorboard": "false"}


@pytest.mark.parametrize(
    ("arguments", "near"),
    [
        (["train", "r.toml", "--run.sead", "3"], "--run.seed"),
        (["train", "r.toml", "--run.sead=3"], "--run.seed"),
        (["resume", "run", "--checkpoint.evry", "5 steps"], "--checkpoint.every"),
        (["train", "r.toml", "--nprocs", "2"], "--nproc"),
        (["data", "preview", "r.toml", "--stepz", "0:1"], "--steps"),
        (["generate", "run", "--promt", "a", "-p", "b"], "--prompt"),
    ],
)
def test_a_misspelled_flag_is_answered_with_the_nearest(
    arguments: list[str], near: str, capsys: pytest.CaptureFixture[str]
) -> None:
    message = usage_error(arguments, capsys)
    assert f"did you mean {near}?" in message
    assert f"see `flame {' '.join(a for a in arguments[:2] if a.isalpha() and a != 'run')} --help`" in message


def test_an_abbreviated_flag_is_not_guessed(capsys: pytest.CaptureFixture[str]) -> None:
    assert "unrecognized" in usage_error(["train", "r.toml", "--run.see", "3"], capsys)


@pytest.mark.parametrize("arguments", [["trian", "r.toml"], [], ["data"], ["data", "previw", "r.toml"]])
def test_an_unknown_or_missing_command_is_a_usage_error_that_lists_them(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    message = usage_error(arguments, capsys)
    assert "COMMAND" in message
    assert "--help" in message


def test_flags_reach_a_command_and_its_errors_are_exit_1(
    write_recipe, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.run(["train", str(write_recipe()), "--schedule.decay", "cosin"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert "schedule.decay" in err
    assert "did you mean cosine?" in err
    assert not (tmp_path / "run").exists()
