"""The examples run, and do what they say."""

from __future__ import annotations

import importlib.util
import json
import runpy
import sys
from pathlib import Path

import pytest
from small_recipes import MODELS

from flame import cli

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys) -> list[str]:
    """The lines that an example prints."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out.splitlines()


def test_the_data_plane_in_another_loop_goes_on_where_it_stopped(
    text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def steps(count: int, saved: str) -> list[str]:
        data = [str(text_folder / "*.jsonl"), str(text_folder / "tokenizer")]
        name = "data_in_your_own_loop.py"
        return run(name, [*data, str(count), str(tmp_path / saved)], monkeypatch, capsys)

    whole = steps(9, "whole.pt")
    assert [line.split(":")[0] for line in whole] == [f"step {n}" for n in range(9)]
    losses = [float(line.split()[-1]) for line in whole]
    assert losses[-1] < losses[0]
    assert steps(4, "parts.pt") + steps(5, "parts.pt") == whole


def test_an_example_is_short() -> None:
    for path in EXAMPLES.glob("*.py"):
        assert path.read_text().count("\n") < 60, path


def test_a_model_of_ones_own_trains_resumes_and_is_held_to_its_code(write_recipe, tmp_path: Path) -> None:
    module = tmp_path / "own_model.py"
    module.write_text(
        (EXAMPLES / "own_model.py").read_text().replace("4096, width: int = 128", "384, width: int = 32")
    )
    config = f'config = "{tmp_path / "gla.json"}"'
    recipe = write_recipe(steps=8, replaced={config: f'module = "{module}"'})
    assert cli.run(["train", str(recipe)]) == 0
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert len(losses) == 8
    assert losses[-1] < losses[0]
    assert cli.run(["export", str(tmp_path / "run"), "--to", str(tmp_path / "model")]) == 0
    assert (tmp_path / "model" / "model.py").exists()
    module.write_text(module.read_text() + "\n# changed\n")
    assert cli.run(["resume", str(tmp_path / "run"), "--run.steps", "9"]) == 1


def other_trainer(
    name: str, places: list[str], text_folder: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> list[list[str]]:
    """What it prints for 8 steps in one go, and for 4 steps and then up to the eighth."""
    config = folder / "gla.json"
    config.write_text(json.dumps(MODELS["gla"]))
    arguments = [str(text_folder / "*.jsonl"), str(text_folder / "tokenizer"), str(config)]
    calls = [("8", places[0]), ("4", places[1]), ("8", places[1])]
    return [run(name, [*arguments, *call], monkeypatch, capsys) for call in calls]


@pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="accelerate is not installed")
@pytest.mark.filterwarnings("default")  # transformers' own
def test_the_data_plane_in_transformers_trainer_goes_on_where_it_stopped(
    text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    places = [str(tmp_path / "whole"), str(tmp_path / "parts")]
    other_trainer("huggingface_trainer.py", places, text_folder, tmp_path, monkeypatch, capsys)
    lines: list[list[float]] = []
    for place in places:
        said = json.loads(Path(place, "checkpoint-8", "trainer_state.json").read_text())["log_history"]
        lines.append([line["loss"] for line in said if "loss" in line])
    assert len(lines[0]) == 8
    assert lines[0][-1] < lines[0][0]
    assert lines[0] == lines[1]
    ends = [json.loads(Path(place, "checkpoint-8", "data.json").read_text()) for place in places]
    assert ends[0] == ends[1]
    assert ends[0]["next_step"] == 8


@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="lightning is not installed")
@pytest.mark.filterwarnings("default")  # lightning's own
def test_the_data_plane_in_lightning_goes_on_where_it_stopped(
    text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    places = [str(tmp_path / "whole.ckpt"), str(tmp_path / "parts.ckpt")]
    said = other_trainer("lightning_module.py", places, text_folder, tmp_path, monkeypatch, capsys)
    whole, first, second = ([line for line in lines if line.startswith("step ")] for lines in said)
    assert [line.split(":")[0] for line in whole] == [f"step {n}" for n in range(8)]
    assert float(whole[-1].split()[-1]) < float(whole[0].split()[-1])
    assert first + second == whole
