"""Validation while training: its figures at any layout, and that it leaves no trace in what is trained."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed.ranks import metrics, train_on, wait_for_step

from flame import cli
from flame.parallel.mesh import Layout
from flame.train.journal import read_lines
from flame.train.keeping import saved_steps, step_directory
from flame.train.saved_tensors import SavedTensors

FIGURES = ("loss", "bits_per_byte", "predicted", "bytes", "documents", "sources")
TRAINED = ("step", "loss", "grad_norm", "learning_rate", "tokens", "rows_digest")
HOOK = """
import random, time
import torch

def evaluate(at):
    random.random(), torch.rand(3)
    tokens = torch.arange(12)[None]
    logits = at.model(tokens).logits
    assert not at.model.training and not logits.requires_grad
    time.sleep(1)
    return {"step": at.step, "logit": logits.sum(), "ids": len(at.tokenizer.encode(["some text"])[0])}

def fails(at):
    raise ValueError(f"no {at.step}")

def lists(at):
    return [1]
"""


def validating(held: str, **more: str) -> dict[str, str]:
    """Changes of the recipe."""
    return {"[logging]": f"[validation]\n{held}\n[logging]", **more}


def validations(run: Path) -> list[dict[str, Any]]:
    return [e for e in read_lines(run / "events.jsonl") if e["event"] == "validation"]


def sets(run: Path) -> list[dict[str, Any]]:
    return [e for e in read_lines(run / "events.jsonl") if e["event"] == "validation_set"]


def model_of(run: Path) -> dict[str, torch.Tensor]:
    return dict(SavedTensors(step_directory(run, saved_steps(run)[-1])))


@pytest.fixture
def own(tmp_path: Path, text_folder: Path) -> str:
    """Two validation sources, and a hook."""
    lines = (text_folder / "text.jsonl").read_text().splitlines()
    (tmp_path / "one.jsonl").write_text("\n".join(lines[:6]))
    (tmp_path / "two.jsonl").write_text("\n".join(line.replace("self", "naïve") for line in lines[6:9]))
    (tmp_path / "hook.py").write_text(HOOK)
    sources = ", ".join(f'{{ name = "{n}", files = "{tmp_path / n}.jsonl" }}' for n in ("one", "two"))
    return f'every = "5 steps"\ntokens = 1500\nsources = [{sources}]\n'


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_with_validation_trains_the_same_parameters_as_one_without(
    write_recipe, tmp_path: Path, own: str, ranks: int
) -> None:
    more = 'at_start = true\nprompts = ["def f(", "class"]\nprompt_tokens = 4\n'
    more += f'hook = "{tmp_path}/hook.py:evaluate"\n'
    plain = write_recipe("plain", steps=12)
    checked = write_recipe("checked", steps=12, replaced=validating(own + more))
    for recipe in (plain, checked):
        assert train_on(ranks, recipe).codes() == [0] * ranks
    one, other = metrics(tmp_path / "plain"), metrics(tmp_path / "checked")
    assert [[r[k] for k in TRAINED] for r in one] == [[r[k] for k in TRAINED] for r in other]
    tensors = model_of(tmp_path / "plain")
    for name, tensor in model_of(tmp_path / "checked").items():
        assert torch.equal(tensor, tensors[name]), name

    found = validations(tmp_path / "checked")
    assert [event["step"] for event in found] == [0, 5, 10, 12]
    assert found[-1]["loss"] < found[0]["loss"]
    assert [set(event["sources"]) for event in found] == [{"one", "two"}] * 4
    assert found[1]["hook"]["step"] == 5 and found[1]["hook"]["ids"] > 1
    assert math.isfinite(found[1]["hook"]["logit"])
    # the hook sleeps a second: its time is no training's
    assert min(event["seconds"] for event in found) >= 1
    assert max(record["step_seconds"] for record in other[5:]) < 1
    samples = list(read_lines(tmp_path / "checked" / "samples.jsonl"))
    assert [(line["step"], line["prompt"]) for line in samples] == [
        (step, prompt) for step in (0, 5, 10, 12) for prompt in ("def f(", "class")
    ]
    assert all(line["text"] for line in samples)


def test_figures_are_the_same_on_any_number_of_ranks(write_recipe, tmp_path: Path, own: str) -> None:
    found: list[list[dict[str, Any]]] = []
    for ranks in (1, 2, 3, 4):
        more = 'at_start = true\nprompts = "import "\nprompt_tokens = 8\n'
        recipe = write_recipe(f"on{ranks}", "llama", steps=6, replaced=validating(own + more))
        assert train_on(ranks, recipe).codes() == [0] * ranks
        found.append(validations(tmp_path / f"on{ranks}"))
    for events in found:
        assert [event["step"] for event in events] == [0, 5, 6]
        assert [[event[name] for name in FIGURES] for event in events] == [
            [event[name] for name in FIGURES] for event in found[0]
        ]
    written = [(tmp_path / f"on{ranks}" / "samples.jsonl").read_text() for ranks in (1, 2, 3, 4)]
    assert written == [written[0]] * 4


def test_ranks_that_share_rows_or_the_vocabulary_validate_and_penalise_as_one_does(
    write_recipe, tmp_path: Path, own: str
) -> None:
    layouts = {}, {"tensor": 2, "shard": 2}, {"context": 2, "tensor": 2}
    found: list[tuple[list[Any], list[Any]]] = []
    for number, layout in enumerate(layouts):
        sizes = "\n".join(f"{name} = {size}" for name, size in layout.items())
        more = f"at_start = true\n[loss]\nz_loss = 1e-2\n[parallel]\n{sizes}"
        recipe = write_recipe(f"run-{number}", "llama", steps=6, replaced=validating(own + more))
        assert train_on(ranks := Layout(**layout).ranks, recipe).codes() == [0] * ranks
        records = [(r["loss"], r["grad_norm"], r["z_loss"]) for r in metrics(tmp_path / f"run-{number}")]
        found.append((records, validations(tmp_path / f"run-{number}")))
    (records, events), *others = found
    assert all(record[2] > 0 for record in records)
    for divided, validated in others:
        for got, wanted in zip(divided, records, strict=True):
            assert got == pytest.approx(wanted, rel=2e-4)
        for got, wanted in zip(validated, events, strict=True):
            assert got["loss"] == pytest.approx(wanted["loss"], abs=2e-5)
            assert [got[k] for k in ("step", *FIGURES[2:5])] == [wanted[k] for k in ("step", *FIGURES[2:5])]
            assert got["sources"].keys() == wanted["sources"].keys()


@pytest.mark.parametrize("more", ['prompts = "def f("', 'hook = "hook.py:evaluate"'])
def test_what_needs_a_whole_model_is_refused_where_tensor_ranks_divide_it(
    write_recipe, tmp_path: Path, own: str, more: str
) -> None:
    changed = validating(own + f"{more}\n[parallel]\ntensor = 2\n")
    trainer = train_on(2, write_recipe("run", "llama", replaced=changed))
    assert trainer.codes() == [1, 1]
    setting = more.split(" ")[0]
    assert (
        f"validation.{setting}: needs a whole model on each rank, which parallel.tensor = 2"
        in trainer.error()
    )


def test_a_fraction_is_validated_and_an_interrupted_run_has_the_same_validations(
    write_recipe, tmp_path: Path
) -> None:
    held = 'fraction = 0.2\nevery = "3000 tokens"\ntokens = 900'
    recipes = [write_recipe(name, steps=16, replaced=validating(held)) for name in ("whole", "again")]
    assert train_on(1, recipes[0]).codes() == [0]
    for stop_at, number in ((6, signal.SIGKILL), (11, signal.SIGTERM)):
        trainer = train_on(1, recipes[1])
        wait_for_step(tmp_path / "again", stop_at)
        trainer.signal(number)
        trainer.codes()
    assert train_on(1, recipes[1]).codes() == [0]
    whole = {e["step"]: [e[k] for k in FIGURES] for e in validations(tmp_path / "whole")}
    again = {e["step"]: [e[k] for k in FIGURES] for e in validations(tmp_path / "again")}
    assert list(whole) == [4, 8, 12, 16]  # of 768 tokens
    assert again == whole
    (read,) = sets(tmp_path / "whole")
    assert read["tokens"] == 900 and "warnings" not in read


def test_validation_at_the_end_of_the_data(write_recipe, tmp_path: Path, text_folder: Path) -> None:
    lines = [json.loads(line)["text"][:300] for line in (text_folder / "text.jsonl").read_text().splitlines()]
    (tmp_path / "short.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in lines))
    replaced = {
        f'files = "{text_folder / "text.jsonl"}"': f'files = "{tmp_path / "short.jsonl"}"\nmax_epochs = 1',
        **validating('fraction = 0.2\nevery = "1000 steps"'),
    }
    assert train_on(2, write_recipe("run", steps=1000, replaced=replaced)).codes() == [0, 0]
    events = list(read_lines(tmp_path / "run" / "events.jsonl"))
    (found,) = validations(tmp_path / "run")
    assert 1 < found["step"] == metrics(tmp_path / "run")[-1]["step"] < 1000
    assert (events[-1]["event"], events[-1]["why"]) == ("done", "the data ended")


@pytest.mark.parametrize(
    ("function", "said"),
    [("fails", "rank 0: ValueError: no 5"), ("lists", "rank 0: TypeError: it returned [1]")],
)
def test_a_hook_that_fails_is_said_and_ends_no_run(
    write_recipe, tmp_path: Path, own: str, function: str, said: str
) -> None:
    hook = own + f'hook = "{tmp_path}/hook.py:{function}"'
    assert train_on(2, write_recipe("run", steps=5, replaced=validating(hook))).codes() == [0, 0]
    (found,) = validations(tmp_path / "run")
    assert found["hook_error"].startswith(said)
    assert found["loss"] > 0


def test_a_set_that_cannot_be_read_stops_all_ranks_with_the_step_saved(write_recipe, tmp_path: Path) -> None:
    held = 'fraction = 1e-9\nevery = "1000 steps"'
    trainer = train_on(2, write_recipe("run", steps=2000, replaced=validating(held)))
    assert trainer.codes() == [1, 1]
    assert "no document is held out of python; raise validation.fraction" in trainer.error()
    steps = saved_steps(tmp_path / "run")
    assert steps and steps[-1] == metrics(tmp_path / "run")[-1]["step"]


def test_less_text_than_asked_for_is_used_and_said(write_recipe, tmp_path: Path, own: str) -> None:
    recipe = write_recipe("run", steps=5, replaced=validating(own.replace("1500", "1000000")))
    assert train_on(1, recipe).codes() == [0]
    (said,) = sets(tmp_path / "run")
    assert (said["documents"], said["tokens_asked"]) == (9, 1_000_000)
    assert 1500 < said["tokens"] < 1_000_000


def test_trained_files_are_warned_of(write_recipe, tmp_path: Path, text_folder: Path) -> None:
    source = f'{{ name = "v", files = "{text_folder}/text.jsonl" }}'
    held = f'every = "9 steps"\nsources = [{source}]\ntokens = 200'
    assert train_on(1, write_recipe("run", steps=5, replaced=validating(held))).codes() == [0]
    (said,) = sets(tmp_path / "run")
    assert said["warnings"][0].startswith('validation.sources: source "v": ')
    assert "tokens_asked" not in said


@pytest.mark.parametrize(
    ("held", "message"),
    [
        ('every = "10 steps"', "validation.every: nothing is held out"),
        ('every = "10 minutes"\nfraction = 0.1', "validation.every: found .*steps, tokens"),
        ('every = "0 steps"\nfraction = 0.1', "validation.every: found 0"),
        ('fraction = 0.1\nprompts = "a"', "validation.prompts: there is no validation"),
        ("fraction = 0.1\nat_start = true", "validation.at_start: there is no validation"),
        ('fraction = 0.1\nhook = "a.py:f"', "validation.hook: there is no validation"),
        ('sources = [{ name = "v", files = "x" }]', "validation.sources: there is no validation"),
        (
            'every = "1 steps"\nfraction = 0.1\nsources = [{ name = "v", files = "x" }]',
            "validation.sources: validation.fraction is set, too; give one of the two",
        ),
        ('every = "1 steps"\nfraction = 0.1\nhook = "f"', 'validation.hook: found "f", expected "file.py:'),
        ('every = "1 steps"\nfraction = 0.1\ntokens = 0', "validation.tokens: found 0"),
    ],
)
def test_settings_that_make_no_validation_are_refused(
    write_recipe, tmp_path: Path, capsys, held: str, message: str
) -> None:
    import re

    recipe = write_recipe("run", replaced=validating(held))
    assert cli.run(["data", "preview", str(recipe)]) == 1
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ('hook = "no.py:f"', "no such file"),
        ('hook = "{}/hook.py:absent"', "it holds no function absent"),
        ('hook = "{}/one.jsonl:f"', "not a Python file"),
        ('prompts = ""', "a prompt has no tokens"),
        ('prompts = "a b c"\nprompt_tokens = 64', "more than data.sequence_length = 64 together"),
    ],
)
def test_hooks_and_prompts_that_cannot_be_end_before_the_first_step(
    write_recipe, tmp_path: Path, own: str, more: str, message: str
) -> None:
    trainer = train_on(1, write_recipe("run", replaced=validating(own + more.format(tmp_path))))
    assert trainer.codes() == [1]
    assert message in trainer.error()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_preview_shows_the_validation_sources(write_recipe, own: str, capsys) -> None:
    recipe = write_recipe("run", replaced=validating(own))
    assert cli.run(["data", "preview", str(recipe), "--split", "validation", "--steps", "0:9", "--json"]) == 0
    rows = [row for line in capsys.readouterr().out.splitlines() for row in json.loads(line)["rows"]]
    assert sum(segment[4] for row in rows for segment in row) == 1500
    assert {segment[0] for row in rows for segment in row} == {"one", "two"}
