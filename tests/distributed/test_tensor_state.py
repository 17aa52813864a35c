"""Initial weights and checkpoints are the same whatever the tensor ranks, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from distributed.ranks import Ranks, metrics, train_on
from distributed.saved_layouts import build_and_save, tensors_in
from models.small_models import SMALL
from small_recipes import MODELS

from flame import schema
from flame.parallel.mesh import Layout
from flame.recipe import read_recipe
from flame.train.checkpoint import step_directory

TENSOR, BOTH = {"tensor": 2, "shard": 1}, {"tensor": 2, "shard": 2}
# an uneven vocabulary, tied or not; fused projections; tables beside the layers
CASES = {
    "mamba2": {"vocab_size": 385},
    "hgrn2": {"vocab_size": 384},
    "llama": {"vocab_size": 385, "tie_word_embeddings": True},
    "gated_deltanet": {"vocab_size": 384},
}
NAMES = [pytest.param(name, marks=() if name == "mamba2" else pytest.mark.slow) for name in CASES]


def assert_equal(one: Path, other: Path) -> None:
    first, second = tensors_in(one), tensors_in(other)
    assert first.keys() == second.keys()
    assert [key for key in first if not torch.equal(first[key], second[key])] == []


@pytest.fixture
def at(write_recipe, monkeypatch):
    """Writes the recipe of a model at a layout: (name of the run, model, steps, layout)."""

    def write(run: str, model: str, steps: int, layout: dict[str, int]) -> Path:
        values = json.loads(json.dumps({**SMALL[model].to_dict(), **CASES[model]}))
        monkeypatch.setitem(MODELS, model, values)
        lines = "\n".join(f"{name} = {size}" for name, size in layout.items())
        replaced = {
            'warmup = "5 steps"': 'warmup = "2 steps"\ndecay = "constant"',
            "tokens_per_step = 768": "tokens_per_step = 512",
            'every = "4 steps"': 'every = "2 steps"\nkeep = 9',
            "[logging]": f"[parallel]\n{lines}\n[logging]",
        }
        return write_recipe(run, model, steps=steps, replaced=replaced)

    return write


def run_all(ranks: Ranks) -> None:
    codes = ranks.codes()
    assert codes == [0] * len(codes)


def saved_at(recipe: Path, layout: dict[str, int], loaded: Path | None, saved: Path) -> Path:
    text = schema.to_toml(read_recipe(recipe))
    run_all(Ranks(Layout(**layout).ranks, build_and_save, text, str(loaded or ""), str(saved)))
    return saved


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("name", NAMES)
def test_initial_weights_do_not_depend_on_tensor_ranks(name, at, tmp_path: Path) -> None:
    alone = saved_at(at("r", name, 4, {}), {}, None, tmp_path / "alone")
    for number, layout in enumerate((TENSOR, BOTH)):
        divided = saved_at(at("r", name, 4, layout), layout, None, tmp_path / f"at-{number}")
        assert_equal(alone, divided)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_move_between_tensor_layouts_and_training_goes_on(name, at, tmp_path: Path) -> None:
    run_all(train_on(1, at("alone", name, 6, {})))
    run = tmp_path / "moved"
    for steps, layout in ((2, TENSOR), (4, {}), (6, BOTH)):
        run_all(train_on(Layout(**layout).ranks, at("moved", name, steps, layout)))
    for a, b in zip(metrics(tmp_path / "alone"), metrics(run), strict=True):
        assert a["rows_digest"] == b["rows_digest"]
        assert b["loss"] == pytest.approx(a["loss"], abs=2e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=2e-4)
    # each way once more, nothing trained in between
    for step, layout in ((2, {}), (2, BOTH), (4, TENSOR), (6, {})):
        written = step_directory(run, step)
        read = saved_at(at("moved", name, 6, layout), layout, written, tmp_path / f"{step}-{len(layout)}")
        assert_equal(written, read)
