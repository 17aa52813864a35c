"""What a run may begin with: given weights, and other runs' checkpoints."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from data.chats import CHATML, said, write_tokenizer
from distributed.ranks import metrics, train_on, wait_for_step
from models.test_model_weights import same_bits, stored, tensors
from small_recipes import MODELS, WriteRecipe
from transformers import AutoConfig, AutoTokenizer

from flame import cli
from flame.recipe import read_recipe
from flame.train.journal import read_lines
from flame.train.keeping import read_record, saved_steps, step_directory
from flame.train.saved_tensors import SavedTensors

TOLERANCE = 1e-6
EXACT = ("step", "tokens", "epoch", "documents", "rows_digest", "learning_rate")


@pytest.fixture
def write_recipe(write_recipe: WriteRecipe) -> WriteRecipe:
    """The usual recipe with a shorter warm-up, so that runs may be short."""
    warmup = 'warmup = "5 steps"'

    def write(*args: Any, replaced: dict[str, str] | None = None, **options: Any) -> Path:
        return write_recipe(*args, replaced={warmup: 'warmup = "2 steps"', **(replaced or {})}, **options)

    return write


@pytest.fixture
def weights(tmp_path: Path, text_folder: Path) -> Path:
    """A folder as on the hub: bfloat16 weights of a tied llama, its configs, a tokenizer."""
    folder = tmp_path / "weights"
    config = AutoConfig.for_model(**MODELS["llama"], tie_word_embeddings=True, bos_token_id=0, eos_token_id=0)
    stored(config, folder, max_shard_size="20KB")
    for path in (text_folder / "tokenizer").iterdir():
        shutil.copy(path, folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": [0, 5], "temperature": 0.6}')
    return folder


def begun_with(write_recipe, weights: Path, tmp_path: Path, name: str = "run", **options: Any) -> Path:
    replaced = {
        f'config = "{tmp_path / "llama.json"}"': f'init_from = "{weights}"',
        **options.pop("replaced", {}),
    }
    return write_recipe(name, "llama", replaced=replaced, **options)


def fails(recipe: Path, ranks: int = 1) -> str:
    trainer = train_on(ranks, recipe)
    assert trainer.codes() == [1] * ranks
    return trainer.error()


def events(run: Path, name: str) -> list[dict[str, Any]]:
    return [e for e in read_lines(run / "events.jsonl") if e["event"] == name]


# ------------------------------------------------------------------------------------ weights


def test_a_run_of_no_steps_is_the_weights_it_began_with(write_recipe, weights, tmp_path, capsys) -> None:
    recipe, run = begun_with(write_recipe, weights, tmp_path, steps=0), tmp_path / "run"
    assert train_on(2, recipe).codes() == [0, 0]
    assert saved_steps(run) == [0]
    assert metrics(run) == []
    assert [e["step"] for e in events(run, "done")] == [0]
    assert cli.run(["export", str(run), "--to", str(tmp_path / "out"), "--dtype", "bfloat16"]) == 0
    assert same_bits(tensors(weights), tensors(tmp_path / "out"))
    said = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert said["temperature"] == 0.6
    assert "finished: step 0 of 0" not in capsys.readouterr().out


def test_what_was_begun_with_is_not_needed_again(write_recipe, weights, tmp_path) -> None:
    recipe, run = begun_with(write_recipe, weights, tmp_path, steps=0), tmp_path / "run"
    assert train_on(1, recipe).codes() == [0]
    expected = tensors(weights)
    shutil.copytree(weights, tmp_path / "moved")
    (tmp_path / "tokenizer").mkdir()
    shutil.rmtree(weights)
    longer = begun_with(write_recipe, weights, tmp_path, steps=6)
    assert train_on(2, longer).codes() == [0, 0]
    assert saved_steps(run) == [0, 4, 6]
    assert [r["step"] for r in metrics(run)] == [1, 2, 3, 4, 5, 6]
    first = json.loads((run / "environment.json").read_text())["origin"]
    assert first["init_from"] == str(weights) and first == read_record(run, 6, "train.json")["origin"]
    assert cli.run(["export", str(run), "--to", str(tmp_path / "out")]) == 0
    trained = tensors(tmp_path / "out")
    assert trained.keys() == expected.keys()
    assert not any(torch.equal(t, expected[n].float()) for n, t in trained.items())

    moved = begun_with(write_recipe, tmp_path / "moved", tmp_path, steps=7)
    assert train_on(1, moved).codes() == [0]
    for file in (tmp_path / "moved").glob("*.safetensors"):
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    other = begun_with(write_recipe, tmp_path / "moved", tmp_path, steps=8)
    assert "model.init_from is" in fails(other)
    without = write_recipe("run", "llama", steps=8)
    (tmp_path / "llama.json").write_text(json.dumps(MODELS["llama"] | {"tie_word_embeddings": True}))
    assert "none here, with other weights" in fails(without)


def test_weights_that_do_not_fit_end_before_the_first_step(write_recipe, weights, tmp_path) -> None:
    line = f'config = "{tmp_path / "llama.json"}"'
    recipe = write_recipe("run", "llama", replaced={line: f'{line}\ninit_from = "{weights}"'})
    (tmp_path / "llama.json").write_text(json.dumps(MODELS["llama"] | {"vocab_size": 400}))
    assert "vocab_size is 384 there and 400 here" in fails(recipe, 2)
    assert saved_steps(tmp_path / "run") == []
    (tmp_path / "llama.json").write_text(json.dumps(MODELS["llama"] | {"vocab_size": 380}))
    assert "has 384 ids" in fails(recipe)


def test_an_export_is_trained_on_with_conversations_and_talks(
    write_recipe, text_folder, tmp_path, capsys
) -> None:
    first = write_recipe("first", "llama", steps=4)
    (tmp_path / "llama.json").write_text(json.dumps(MODELS["llama"] | {"vocab_size": 400}))
    assert train_on(1, first).codes() == [0]
    assert (
        cli.run(["export", str(tmp_path / "first"), "--to", str(tmp_path / "base"), "--dtype", "bfloat16"])
        == 0
    )
    tokenizer = write_tokenizer(text_folder / "tokenizer", tmp_path / "tok", CHATML)
    (tmp_path / "own.jinja").write_text(CHATML)
    lines = [{"messages": said(f"say {i}", "word " * (i % 9 + 1), "?", "no")} for i in range(120)]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    replaced = {
        f'config = "{tmp_path / "llama.json"}"': f'init_from = "{tmp_path / "base"}"',
        f'path = "{text_folder / "tokenizer"}"': f'path = "{tokenizer}"',
        f'files = "{text_folder / "text.jsonl"}"': f'files = "{tmp_path / "chats.jsonl"}"\n'
        f'chat = "messages"\nchat_template = "{tmp_path / "own.jinja"}"',
        "sequence_length = 64": 'sequence_length = 128\npacking = "document"',
    }
    tuned = write_recipe("tuned", "llama", steps=12, replaced=replaced)
    assert train_on(2, tuned).codes() == [0, 0]
    found = metrics(tmp_path / "tuned")
    assert found[-1]["loss"] < found[0]["loss"] - 0.3
    capsys.readouterr()
    assert cli.run(["export", str(tmp_path / "tuned"), "--to", str(tmp_path / "chat")]) == 0
    loaded = AutoTokenizer.from_pretrained(tmp_path / "chat")
    assert loaded.apply_chat_template(said("hi", "ho"), tokenize=False).startswith("<|im_start|>user")
    config = json.loads((tmp_path / "chat" / "config.json").read_text())
    assert config["exported_step"] == 12 and config["dtype"] == "float32"
    assert cli.run(["generate", str(tmp_path / "chat"), "-p", "say", "--tokens", "4"]) == 0


# ----------------------------------------------------------------------------------- branching


ALL = 'start_from_parts = ["model", "optimizer", "data"]'


def branch(
    write_recipe,
    name: str,
    start: Path | str,
    *more: str,
    steps: int = 12,
    replaced: dict[str, str] | None = None,
) -> Path:
    """A recipe that starts from another run; `more` lines stand in [run]."""
    lines = "\n".join([f'start_from = "{start}"', *more])
    return write_recipe(name, steps=steps, replaced={"[model]": f"{lines}\n[model]", **(replaced or {})})


@pytest.fixture
def trunk(write_recipe, tmp_path: Path) -> Path:
    """A run of 12 steps with checkpoints at 4, 8 and 12."""
    recipe = write_recipe("trunk", steps=12, replaced={'every = "4 steps"': 'every = "4 steps"\nkeep = 3'})
    assert train_on(2, recipe).codes() == [0, 0]
    assert saved_steps(tmp_path / "trunk") == [4, 8, 12]
    return tmp_path / "trunk"


def test_a_branch_with_all_parts_is_the_trunk_from_there_on(write_recipe, trunk, tmp_path) -> None:
    recipe = branch(write_recipe, "same", f"{trunk}@4", ALL)
    assert train_on(2, recipe).codes() == [0, 0]
    expected, got = metrics(trunk)[4:], metrics(tmp_path / "same")
    timing = {"tokens_per_second", "step_seconds", "data_seconds", "memory_gib", "time"}
    assert [{k: v for k, v in r.items() if k not in timing} for r in got] == [
        {k: v for k, v in r.items() if k not in timing} for r in expected
    ]
    ours, theirs = (dict(SavedTensors(step_directory(run, 12))) for run in (tmp_path / "same", trunk))
    assert same_bits(ours, theirs)
    told = events(tmp_path / "same", "start")[0]["origin"]
    assert (told["run"], told["step"], told["parts"]) == (str(trunk), 4, ["model", "optimizer", "data"])
    assert read_record(tmp_path / "same", 12, "train.json")["origin"] == told
    assert not (trunk / "environment.json").samefile(tmp_path / "same" / "environment.json")


def test_a_decay_branches_off_a_trunk_and_reads_what_the_trunk_would_have_read(
    write_recipe, trunk, tmp_path
) -> None:
    decay = 'warmup = "5 steps"\ndecay = "wsd"\ndecay_fraction = 0.4'
    replaced = {'warmup = "5 steps"': decay}
    recipe = branch(write_recipe, "decay", f"{trunk}@8", ALL, steps=10, replaced=replaced)
    trainer = train_on(3, recipe)  # another number of ranks
    wait_for_step(tmp_path / "decay", 9)
    trainer.signal(signal.SIGKILL)
    trainer.codes()
    assert train_on(1, recipe).codes() == [0]
    expected, got = metrics(trunk)[8:10], metrics(tmp_path / "decay")
    rows = [key for key in EXACT if key != "learning_rate"]
    assert [[r[k] for k in rows] for r in got] == [[r[k] for k in rows] for r in expected]
    assert got[0]["loss"] == pytest.approx(expected[0]["loss"], abs=TOLERANCE)
    # 4 of 10 steps decay from 3e-3 to 3e-4
    assert [r["learning_rate"] for r in got] == pytest.approx([9.75e-4, 3e-4])


def test_without_its_data_a_branch_counts_from_zero(write_recipe, trunk, tmp_path) -> None:
    plain = write_recipe("plain", steps=3)
    assert train_on(1, plain).codes() == [0]
    found: dict[str, list[dict[str, Any]]] = {}
    for name, parts in (("model", ""), ("both", 'start_from_parts = ["model", "optimizer"]')):
        assert train_on(1, branch(write_recipe, name, str(trunk), parts, steps=3)).codes() == [0]
        found[name] = metrics(tmp_path / name)
        same_rows = [[r[k] for k in EXACT] for r in found[name]]
        assert same_rows == [[r[k] for k in EXACT] for r in metrics(tmp_path / "plain")]
        assert events(tmp_path / name, "start")[0]["origin"]["step"] == 12
    assert (
        found["model"][0]["loss"] == found["both"][0]["loss"] < metrics(tmp_path / "plain")[0]["loss"] - 0.1
    )
    assert found["model"][2]["loss"] != found["both"][2]["loss"]


def test_excluded_parameters_begin_anew(write_recipe, trunk, tmp_path) -> None:
    fresh = write_recipe("fresh", steps=0)
    parts = 'start_from_parts = ["model", "optimizer"]'
    recipe = branch(write_recipe, "run", f"{trunk}@8", parts, 'exclude = ["lm_head.*"]', steps=0)
    assert train_on(1, fresh).codes() == train_on(1, recipe).codes() == [0]
    ours, theirs, anew = (
        dict(SavedTensors(step_directory(run, step)))
        for run, step in ((tmp_path / "run", 0), (trunk, 8), (tmp_path / "fresh", 0))
    )
    for name, tensor in ours.items():
        assert torch.equal(tensor, anew[name] if name == "lm_head.weight" else theirs[name]), name
    assert not torch.equal(theirs["lm_head.weight"], anew["lm_head.weight"])
    longer = branch(write_recipe, "run", f"{trunk}@8", parts, 'exclude = ["lm_head.*"]', steps=2)
    assert train_on(2, longer).codes() == [0, 0]


def test_a_branch_begins_again_where_it_began_though_the_trunk_went_on(write_recipe, trunk, tmp_path) -> None:
    hidden = tmp_path / "step-12"
    step_directory(trunk, 12).rename(hidden)
    recipe = branch(write_recipe, "run", str(trunk), steps=4)
    trainer = train_on(1, recipe)
    wait_for_step(tmp_path / "run", 2)
    trainer.signal(signal.SIGKILL)
    trainer.codes()
    first = metrics(tmp_path / "run")[:2]
    if saved_steps(tmp_path / "run"):
        pytest.skip("it was too fast to be killed before its first checkpoint")
    hidden.rename(step_directory(trunk, 12))
    assert train_on(1, recipe).codes() == [0]
    assert [e["origin"]["step"] for e in events(tmp_path / "run", "start")] == [8, 8]
    assert [r["loss"] for r in metrics(tmp_path / "run")[:2]] == [r["loss"] for r in first]
    shutil.rmtree(trunk)
    longer = branch(write_recipe, "run", str(trunk), steps=6)
    assert train_on(1, longer).codes() == [0]


def test_a_trunk_that_cannot_be_branched_off_is_named_with_what_there_is(
    write_recipe, trunk, tmp_path
) -> None:
    def said_of(start: str, *more: str, **options: Any) -> str:
        return fails(branch(write_recipe, "run", start, *more, **options), 2)

    assert f"{tmp_path / 'no'}: no run here" in said_of(str(tmp_path / "no"))
    assert "no checkpoint of step 5; there are 4, 8, 12" in said_of(f"{trunk}@5")
    assert "steps go on from" in said_of(f"{trunk}@8", ALL, steps=6)
    assert "seed: 7 when the run began, 8 now" in said_of(
        f"{trunk}@8", ALL, replaced={"seed = 7": "seed = 8"}
    )
    config = tmp_path / "gla.json"
    recipe = branch(write_recipe, "run", f"{trunk}@8")
    config.write_text(json.dumps(MODELS["gla"] | {"num_hidden_layers": 3}))
    assert "num_hidden_layers is 2 there and 3 here" in fails(recipe)
    config.write_text(json.dumps(MODELS["gla"]))
    shard = next(step_directory(trunk, 12).glob("__*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    said = fails(branch(write_recipe, "run", f"{trunk}@12"), 2)
    assert f"{trunk}: not whole: step 12: {shard.name} holds" in said and "other steps there: 4, 8" in said
    newest = branch(write_recipe, "run", str(trunk), steps=0)
    assert train_on(1, newest).codes() == [0]
    assert events(tmp_path / "run", "start")[-1]["origin"]["step"] == 8
    assert "step" in events(tmp_path / "run", "checkpoint_rejected")[-1]


def test_settings_that_leave_the_beginning_open_are_refused(write_recipe, tmp_path, capsys) -> None:
    for line, reason in (
        ('start_from_parts = ["optimizer"]', 'expected a list of model, optimizer, data, with "model" in it'),
        (ALL, "there is no run.start_from to take them from"),
        ('exclude = ["lm_head.*"]', "all parameters begin anew without"),
        ('start_from = "a"\n[model]\ninit_from = "b"', "a run begins with one of the two"),
        ("steps = -1", "run.steps: found -1, expected at least 0"),
    ):
        recipe = write_recipe(replaced={"seed = 7\n": f"seed = 7\n{line}\n"})
        text = recipe.read_text()
        if "[model]\ninit" in line:
            recipe.write_text(text.replace("\n[model]\nconfig", "\nconfig", 1).replace("steps = 30\n", ""))
            recipe.write_text(recipe.read_text().replace("[run]\n", "[run]\nsteps = 30\n"))
        if "steps" in line:
            recipe.write_text(text.replace("\nsteps = 30", ""))
        assert cli.run(["train", str(recipe)]) == 1
        assert reason in capsys.readouterr().err, line


def test_a_resume_in_bfloat16_is_the_undisturbed_run(write_recipe, tmp_path) -> None:
    replaced = {"[optimizer]": '[precision]\ncompute = "bfloat16"\n[optimizer]'}
    whole, parts = (write_recipe(name, steps=8, replaced=replaced) for name in ("whole", "parts"))
    assert train_on(1, whole).codes() == [0]
    text = parts.read_text()
    parts.write_text(text.replace("steps = 8", "steps = 8\nmax_restarts = 0"))
    trainer = train_on(1, parts)
    wait_for_step(tmp_path / "parts", 3)
    trainer.signal(signal.SIGTERM)
    trainer.codes()
    assert train_on(1, parts).codes() == [0]
    assert [r["loss"] for r in metrics(tmp_path / "whole")] == [
        r["loss"] for r in metrics(tmp_path / "parts")
    ]


def test_a_run_that_is_known_by_no_step_is_read_as_a_directory(tmp_path, write_recipe) -> None:
    (tmp_path / "a@3").mkdir()
    recipe = branch(write_recipe, "run", "a@3")
    assert read_recipe(recipe).run.start_from == str(Path("a@3").absolute())
