"""`flame eval`: the loss of a run or an export on held out text, and tasks of lm-evaluation-harness."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distributed.ranks import train_on

from flame import cli
from flame.data.tokens import load_tokenizer
from flame.models import cpu
from flame.models.export import load_exported
from flame.train.journal import read_lines


@pytest.fixture(scope="module")
def known() -> dict[str, Path]:
    """What was trained for the tests of this file."""
    return {}


@pytest.fixture
def trained(known: dict[str, Path], write_recipe, tmp_path: Path) -> Path:
    """A llama of a few steps, validated on a fifth of its documents, and its export in `export`."""
    if "run" not in known:
        held = '[validation]\nfraction = 0.2\ntokens = 2000\nevery = "100 steps"\n[logging]'
        assert train_on(1, write_recipe("run", "llama", 8, {"[logging]": held})).codes() == [0]
        assert cli.run(["export", str(tmp_path / "run"), "--to", str(tmp_path / "export")]) == 0
        known["run"] = tmp_path / "run"
    return known["run"]


def figures(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert cli.run(["eval", *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_run_is_evaluated_on_what_it_holds_out_as_it_was_when_it_ended(trained: Path, capsys) -> None:
    (event,) = (e for e in read_lines(trained / "events.jsonl") if e["event"] == "validation")
    found = figures(capsys, str(trained))
    assert found == {key: event[key] for key in found}
    assert figures(capsys, str(trained), "--tokens", "500")["predicted"] < 500


def test_files_are_evaluated_by_an_export_and_by_its_run_alike(trained: Path, tmp_path: Path, capsys) -> None:
    texts = ["def f(x):\n    return x + 1\n", "import os\nprint(os.getcwd())\n", "naïve é"]
    file = tmp_path / "held.jsonl"
    file.write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    export = trained.with_name("export")
    options = ["--files", str(file), "--text", "body"]
    found = figures(capsys, str(export), *options)
    assert figures(capsys, str(trained), *options)["loss"] == pytest.approx(found["loss"], rel=1e-6)

    # each document alone, through transformers
    cpu.install()
    model: Any = load_exported(export)
    total, predicted, size = 0.0, 0, 0
    for text, ids in zip(texts, load_tokenizer(export, bos=False).encode(texts), strict=True):
        tokens = torch.tensor(ids, dtype=torch.int64)
        with torch.no_grad():
            logits = model(tokens[None]).logits[0].float()
        total += F.cross_entropy(logits[:-1], tokens[1:], reduction="sum").item()
        predicted += len(ids) - 1
        size += len(text.encode()) - len(load_tokenizer(export, bos=False).decode(ids[:1]).encode())
    assert (found["predicted"], found["bytes"], found["documents"]) == (predicted, size, 3)
    assert found["loss"] == pytest.approx(total / predicted, rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(total / math.log(2) / size, rel=1e-5)


def test_a_run_that_has_its_config_from_the_weights_it_began_with(
    trained: Path, write_recipe, tmp_path: Path, capsys
) -> None:
    weights, text = trained.with_name("export"), tmp_path / "held.jsonl"
    text.write_text(json.dumps({"text": "def f(x):\n    return x + 1\n"}) + "\n")
    begun = {
        f'config = "{tmp_path / "llama.json"}"': f'init_from = "{weights}"',
        "steps = 8": "steps = 0",
        'warmup = "5 steps"': 'warmup = "0 steps"',
    }
    assert train_on(1, write_recipe("begun", "llama", 8, begun)).codes() == [0]
    moved = (tmp_path / "begun").rename(tmp_path / "moved")
    loss = figures(capsys, str(moved), "--files", str(text))["loss"]
    assert loss == pytest.approx(figures(capsys, str(weights), "--files", str(text))["loss"], rel=1e-6)


def test_what_is_printed_names_loss_and_bits(trained: Path, capsys) -> None:
    assert cli.run(["eval", str(trained)]) == 0
    assert " bits per byte, over " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{export}"], "names no data: give --files"),
        (["{export}", "--step", "3"], "has no steps"),
        (["{run}", "--step", "3"], "no checkpoint of step 3"),
        (["{run}", "--files", "no.jsonl"], "no such file"),
        (["{run}", "--tokens", "many"], '--tokens: found "many"'),
        (["{run}", "--tasks", "a", "--files", "b"], "give one of the two"),
        (["nowhere"], "neither a run directory nor an exported model"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(
    trained: Path, capsys, arguments: list[str], message: str
) -> None:
    places = {"run": trained, "export": trained.with_name("export")}
    assert cli.run(["eval", *(argument.format(**places) for argument in arguments)]) == 1
    assert message in capsys.readouterr().err


def test_a_run_that_holds_nothing_out_asks_for_files(write_recipe, tmp_path: Path, capsys) -> None:
    assert train_on(1, write_recipe("plain", "llama", 5)).codes() == [0]
    assert cli.run(["eval", str(tmp_path / "plain")]) == 1
    assert "nothing is held out for validation" in capsys.readouterr().err


# --------------------------------------------------------------------------------- the harness

TASK = """
task: endings
dataset_path: json
dataset_kwargs:
  data_files:
    test: "{file}"
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: label
doc_to_choice: choices
metric_list:
  - metric: acc
"""


def test_tasks_without_the_harness_say_what_to_install(trained: Path, capsys, monkeypatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert cli.run(["eval", str(trained.with_name("export")), "--tasks", "arc_easy"]) == 1
    assert 'pip install "flame[eval]"' in capsys.readouterr().err


@pytest.mark.filterwarnings("default")  # the harness and what it imports warn of their own
def test_a_task_of_local_files_runs_on_a_run_and_on_its_export(
    trained: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (the extra: eval)")
    pytest.importorskip("accelerate", reason="accelerate is not installed (the extra: eval)")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lines = [
        {"question": "import", "choices": [" os", " zzqqxx zzqqxx"], "label": 0},
        {"question": "def f(self", "choices": ["QXZ QXZ QXZ QXZ", "):"], "label": 1},
    ]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "endings.yaml").write_text(TASK.format(file=tmp_path / "test.jsonl"))
    options = ("--tasks", "endings", "--include", str(tmp_path / "tasks"))
    results = figures(capsys, str(trained), *options)
    assert results["endings"]["acc"] == 1.0  # the shorter endings are likelier
    assert figures(capsys, str(trained.with_name("export")), *options) == results
    assert cli.run(["eval", str(trained.with_name("export")), *options]) == 0
    assert "endings" in capsys.readouterr().out
    assert cli.run(["eval", str(trained), "--tasks", "ending", "--include", str(tmp_path / "tasks")]) == 1
    assert 'no task is called "ending"; did you mean endings?' in capsys.readouterr().err
