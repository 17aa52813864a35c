"""flame from Python: the stable names, and training, loading and exporting as functions."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from test_docs import ROOT, blocks

import flame
from flame import cli
from flame.errors import CheckpointError, ModelError, RecipeError
from flame.train.keeping import saved_steps

HEAVY = ("torch", "transformers", "numpy", "tomli_w")


def test_importing_flame_imports_nothing_heavy() -> None:
    code = f"import sys, flame; print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_stable_name_is_there_typed_and_documented() -> None:
    names = [name for name in flame.__all__ if name != "__version__"]
    page = (ROOT / "docs" / "python.md").read_text()
    listed = re.findall(r"^\| `(\w+)", page, re.MULTILINE)
    assert sorted(listed) == sorted(names)
    stub = (ROOT / "src" / "flame" / "__init__.py").read_text()
    assert sorted(re.findall(r"import (\w+) as \1$", stub, re.MULTILINE)) == sorted(names)
    for name in names:
        assert getattr(flame, name).__doc__ or name == "IGNORED", name
    assert set(names) <= set(dir(flame))
    with pytest.raises(AttributeError, match="no attribute 'fit'"):
        _ = flame.fit


@pytest.mark.parametrize("first", ["pass", "import flame.train.loss", "from flame import Recipe"])
def test_train_is_a_function_and_its_package_whatever_was_imported_before(first: str) -> None:
    code = f"{first}\nfrom flame import train\nimport flame.train.config as config\n"
    code += "print(callable(train), config.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "flame.train.config"]


def test_a_recipe_trains_here_and_goes_on_as_the_command_does(write_recipe, tmp_path: Path) -> None:
    before, handlers = dict(os.environ), [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    recipe = flame.read_recipe(str(write_recipe(steps=6)))
    done = flame.train(recipe)
    assert (done.directory, done.step, done.finished) == (tmp_path / "run", 6, True)
    recipe.run.steps = 8
    recipe.logging.every = "1 steps"  # as a recipe says it
    done = flame.train(recipe)
    assert [line["step"] for line in done.metrics] == list(range(1, 9))
    assert done.metrics[-1]["loss"] < done.metrics[0]["loss"]
    assert dict(os.environ) == before
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert not torch.distributed.is_initialized()

    assert cli.run(["train", str(write_recipe("other", steps=6)), "--nproc", "1"]) == 0
    of = [(run / "metrics.jsonl").read_text() for run in (tmp_path / "run", tmp_path / "other")]
    losses = [re.findall(r'"loss":[^,]*|"rows_digest":[^,}]*', text) for text in of]
    assert len(losses[1]) == 12
    assert losses[0][:12] == losses[1], "the steps before the run was made longer"


def test_training_raises_what_is_wrong_and_can_be_called_again(write_recipe, tmp_path: Path) -> None:
    recipe = flame.read_recipe(write_recipe(steps=6))
    recipe.optimizer.learning_rate = "fast"
    with pytest.raises(RecipeError, match=r"optimizer.learning_rate: found \"fast\""):
        flame.train(recipe)
    recipe.optimizer.learning_rate = 1e-3
    recipe.data.sources[0].files = [str(tmp_path / "absent.jsonl")]
    with pytest.raises(flame.FlameError, match="no such file"):
        flame.train(recipe)
    assert not torch.distributed.is_initialized()
    assert flame.train(flame.read_recipe(tmp_path / "run.toml")).step == 6


def test_a_signal_saves_the_state_and_training_goes_on_later(write_recipe, tmp_path: Path) -> None:
    recipe = flame.read_recipe(write_recipe(steps=2000))
    metrics = tmp_path / "run" / "metrics.jsonl"

    def stop_soon() -> None:
        while not (metrics.exists() and metrics.read_text().count("\n") >= 6):
            threading.Event().wait(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=stop_soon, daemon=True).start()
    done = flame.train(recipe)
    assert not done.finished
    assert done.step == saved_steps(tmp_path / "run")[-1] < 2000
    recipe.run.steps = done.step + 1
    assert flame.train(recipe).finished


@pytest.mark.parametrize("model", ["gla", "llama"])
def test_a_loaded_run_is_the_export_of_its_checkpoint(write_recipe, tmp_path: Path, model: str) -> None:
    flame.train(flame.read_recipe(write_recipe(model=model, steps=6)))
    run = flame.load_run(tmp_path / "run", step=4)
    assert (run.step, run.recipe.run.steps, run.config.model_type) == (4, 6, model)
    assert flame.load_run(str(tmp_path / "run")).step == 6
    assert flame.export(tmp_path / "run", tmp_path / "model", step=4) == 4
    loaded = flame.api.load_exported(tmp_path / "model").state_dict()
    assert dict.fromkeys(loaded, True) == {
        name: torch.equal(value, loaded[name]) for name, value in run.model.state_dict().items()
    }
    ids = run.tokenizer("def f(", return_tensors="pt").input_ids
    with torch.no_grad():
        text = run.tokenizer.decode(run.model.generate(ids, max_new_tokens=4, do_sample=False)[0])
    assert text.startswith("def f(")


def test_a_run_with_a_model_and_a_tokenizer_of_flames_own_is_loaded(write_recipe, tmp_path: Path) -> None:
    config = f'config = "{tmp_path / "gla.json"}"'
    module = ROOT / "examples" / "own_model.py"
    path = write_recipe(steps=6, replaced={config: f'module = "{module}"'})
    recipe = flame.read_recipe(path, {"tokenizer.path": "bytes"})
    flame.train(recipe)
    run = flame.load_run(tmp_path / "run")
    assert run.config is None
    assert run.model.head.out_features == 4096
    assert run.tokenizer.decode(run.tokenizer.encode(["naïve"])[0][:-1]) == "naïve"


def test_loading_and_exporting_say_what_is_not_there(write_recipe, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no run here"):
        flame.load_run(tmp_path / "nowhere")
    flame.train(flame.read_recipe(write_recipe(steps=6)))
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 9; there are \[4, 6\]"):
        flame.load_run(tmp_path / "run", step=9)
    with pytest.raises(RecipeError, match='dtype: found "int8"'):
        flame.export(tmp_path / "run", tmp_path / "model", dtype="int8")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(ModelError, match="is not an export"):
        flame.export(tmp_path / "run", tmp_path / "mine")


def test_ranks_that_torchrun_started_train_one_run(write_recipe, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys, flame\nprint(flame.train(flame.read_recipe(sys.argv[1])).step)\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(script), str(write_recipe(steps=6))], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "6"
    assert '"ranks":2' in (tmp_path / "run" / "events.jsonl").read_text()
    assert "6" in (tmp_path / "run" / "logs" / "rank-1.log").read_text().splitlines()


@pytest.mark.parametrize("page", ["python.md", "extend.md"])
def test_the_python_of_a_page_runs_from_top_to_bottom(
    page: str, write_recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_recipe("recipe", steps=20, replaced={f'"{tmp_path / "recipe"}"': '"runs/first"'})
    (tmp_path / "data").symlink_to(Path(flame.read_recipe("recipe.toml").tokenizer.path).parent)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    names: dict[str, object] = {}
    shown = blocks(ROOT / "docs" / page, "python")
    assert len(shown) > 2
    for block in shown:
        exec(compile(block, page, "exec"), names)
    assert (tmp_path / "model" / "config.json").exists() or page != "python.md"
