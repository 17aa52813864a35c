"""What comes out is the model that was trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from distributed.ranks import train_on
from transformers import AutoModelForCausalLM, AutoTokenizer

from flame import cli
from flame.batch import IGNORED, Batch, Row
from flame.data.catalog import open_catalog
from flame.data.loader import make_batch
from flame.data.plan import DataPlan
from flame.data.preview import preview
from flame.data.tokens import load_tokenizer
from flame.models import cpu
from flame.models.build import build_on_meta, initialize
from flame.models.registry import family_of, load_config
from flame.recipe import Recipe, read_recipe
from flame.train.keeping import saved_steps, step_directory
from flame.train.loss import LossModule
from flame.train.saved_tensors import SavedTensors

STEPS = 6


@pytest.fixture
def export_of(write_recipe, tmp_path: Path, capsys) -> Any:
    """Trains a model for some steps on two ranks and exports it; gives the recipe and the export."""

    def make(model: str = "gla", *options: str) -> tuple[Recipe, Path]:
        recipe = read_recipe(write_recipe(model=model, steps=STEPS))
        assert train_on(2, tmp_path / "run.toml").codes() == [0, 0]
        assert cli.run(["export", str(tmp_path / "run"), "--to", str(tmp_path / "export"), *options]) == 0
        assert f"after step {STEPS}" in capsys.readouterr().out or options
        return recipe, tmp_path / "export"

    return make


def as_trained(recipe: Recipe, step: int) -> LossModule:
    """The trainer's own model and loss, with the weights of a checkpoint."""
    config = load_config(recipe.model.config)
    family, model = family_of(config), build_on_meta(config)
    initialize(model, config, seed=0, device="cpu")
    model.load_state_dict(dict(SavedTensors(step_directory(recipe.directory, step))))
    return LossModule(model, family.hidden, family.head(model)).eval()


def as_exported(path: Path) -> Any:
    cpu.install()
    model, info = AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


def coming_rows(recipe: Recipe) -> list[Row]:
    """Packed rows that were not trained."""
    plan = DataPlan.of(recipe.data, recipe.batch.tokens_per_step, recipe.run.seed)
    catalog = open_catalog(recipe.data, recipe.tokenizer, plan, Path())
    return next(preview(catalog, plan, range(STEPS, STEPS + 1), 1))


@torch.no_grad()
def trainers_logits(trainer: LossModule, batch: Batch) -> torch.Tensor:
    states = trainer._hidden(
        trainer.guest, batch.tokens, batch.positions, batch.cu_seqlens, batch.longest_segment
    )
    return trainer._head(states)


def documents(row: Row) -> list[torch.Tensor]:
    """The tokens of each segment, [1, n]."""
    ends = np.cumsum([segment.length for segment in row.segments])[:-1]
    return [torch.from_numpy(part.astype(np.int64))[None] for part in np.split(row.tokens, ends)]


@pytest.mark.parametrize("model", ["gla", "llama"])
def test_an_export_gives_the_trainers_logits_and_loss(export_of, model: str) -> None:
    recipe, folder = export_of(model)
    trainer, exported = as_trained(recipe, STEPS), as_exported(folder)
    assert {p.dtype for p in exported.parameters()} == {torch.float32}
    rows = coming_rows(recipe)
    with torch.no_grad():
        for tokens in documents(rows[0]):
            alone = Row(0, tokens[0].numpy(), np.array([tokens.shape[1]]))
            logits = exported(input_ids=tokens, use_cache=False).logits
            assert torch.equal(logits, trainers_logits(trainer, make_batch([alone])))

        packed = next(row for row in rows if len(row.segments) > 1)
        batch = make_batch([packed])
        ours = trainer(batch) / (batch.labels != IGNORED).sum()
        # transformers sees one document at a time
        losses = [
            F.cross_entropy(exported(input_ids=t, use_cache=False).logits[0, :-1], t[0, 1:], reduction="sum")
            for t in documents(packed)
        ]
    assert abs(ours - sum(losses) / (batch.labels != IGNORED).sum()) < 1e-5
    assert ours < np.log(384) - 0.05, "it has learnt something, or equal would mean little"


def test_a_step_of_ones_choice_is_exported_in_a_type_of_ones_choice(export_of, tmp_path: Path) -> None:
    recipe, folder = export_of("gla", "--step", "4", "--dtype", "bfloat16")
    weights = as_exported(folder).state_dict()
    saved = dict(SavedTensors(step_directory(recipe.directory, 4)))
    assert saved_steps(recipe.directory) == [4, STEPS]
    for name, tensor in weights.items():
        assert torch.equal(tensor.float(), saved[name].to(torch.bfloat16).float()), name


def test_the_exports_tokenizer_gives_the_ids_of_training(export_of) -> None:
    recipe, folder = export_of()
    texts = ["def f(x):\n\treturn x  # naïve 東京 🔥", "  two  spaces", "a", "import os\r\n"]
    training = load_tokenizer(recipe.tokenizer.path, bos=False)
    exported = AutoTokenizer.from_pretrained(folder)
    for text, ids in zip(texts, training.encode(texts), strict=True):
        assert [*exported(text).input_ids, exported.eos_token_id] == ids.tolist()
        assert exported.decode(ids, skip_special_tokens=True) == text


def test_the_run_and_its_export_generate_the_same_text(export_of, tmp_path: Path, capsys) -> None:
    _, folder = export_of()
    texts: list[str] = []
    for source in (tmp_path / "run", folder):
        for options in (["--temperature", "0"], ["--temperature", "1", "--seed", "3"]):
            ask = ["generate", str(source), "-p", "def __init__(", "--tokens", "12", *options]
            assert cli.run(ask) == 0
            texts.append(capsys.readouterr().out)
    assert texts[:2] == texts[2:]
    assert all(text.startswith("def __init__(") for text in texts)
    assert len(texts[0]) > len("def __init__(\n")
    assert texts[0] != texts[1]


def test_a_second_export_replaces_the_first_and_another_folder_stays(
    export_of, tmp_path: Path, capsys
) -> None:
    _, folder = export_of()
    (folder / "stale").touch()
    weights = (folder / "model.safetensors").read_bytes()
    ask = ["export", str(tmp_path / "run"), "--to"]
    assert cli.run([*ask, str(folder), "--step", "4"]) == 0
    assert not (folder / "stale").exists()
    assert (folder / "model.safetensors").read_bytes() != weights
    assert json.loads((folder / "config.json").read_text())["model_type"] == "gla"

    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("mine")
    capsys.readouterr()
    assert cli.run([*ask, str(precious)]) == 1
    assert f"flame: {precious}: exists and is not an export" in capsys.readouterr().err
    assert [p.name for p in precious.iterdir()] == ["thesis.txt"]


def test_a_checkpoint_that_is_damaged_or_not_there_is_not_exported(export_of, tmp_path: Path, capsys) -> None:
    recipe, folder = export_of()
    weights = (folder / "model.safetensors").read_bytes()
    shard = step_directory(recipe.directory, STEPS) / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1])
    ask = ["export", str(tmp_path / "run"), "--to", str(folder)]
    capsys.readouterr()
    assert cli.run(ask) == 1
    said = capsys.readouterr().err
    assert "__0_0.distcp holds" in said
    assert "[4, 6]" in said
    assert cli.run([*ask, "--step", "5"]) == 1
    assert "no checkpoint of step 5; there are [4, 6]" in capsys.readouterr().err
    assert (folder / "model.safetensors").read_bytes() == weights
