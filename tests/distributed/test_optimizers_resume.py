"""Runs with other optimizers, groups, an average and z-loss are resumed as any run, and say what they do."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed.ranks import Ranks, metrics, train_on, train_text, wait_for_step
from safetensors.torch import load_file

from flame import cli, schema
from flame.recipe import read_recipe
from flame.train.keeping import step_directory
from flame.train.saved_tensors import SavedTensors

STEPS = 20
CLOSE = 1e-4  # in the loss on other ranks: Muon's bfloat16 may round a last bit of its input otherwise
MUON = """learning_rate = 3e-3
name = "muon"
adamw_learning_rate = 2e-3
ema = 0.9
[[optimizer.groups]]
pattern = "lm_head.*"
name = "sgd"
learning_rate_factor = 10
[[optimizer.groups]]
pattern = "*norm.weight"
weight_decay = 0.01
[loss]
z_loss = 1e-3"""
SGD = 'learning_rate = 3e-2\nname = "sgd"\nema = 0.9'
OPTIMIZERS = {"muon": MUON, "sgd": SGD}
KEYS = ("step", "tokens", "rows_digest", "learning_rate", "updates_skipped")


def whole_state(run: Path) -> dict[str, Any]:
    manifest = json.loads((step_directory(run, STEPS) / "manifest.json").read_text())
    return manifest["files"]["__0_0.distcp"]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_another_optimizer_resumes_bit_for_bit_and_on_other_ranks_within_a_tolerance(
    write_recipe, tmp_path: Path, name: str
) -> None:
    settings = {"learning_rate = 3e-3": OPTIMIZERS[name]}
    reference = write_recipe("reference", "llama", STEPS, settings)
    assert train_on(1, reference).codes() == [0]
    wanted = metrics(tmp_path / "reference")
    for run, ranks in [("same", [1, 1]), ("other", [2, 3])]:
        recipe = write_recipe(run, "llama", STEPS, settings)
        begun = train_on(ranks[0], recipe)
        wait_for_step(tmp_path / run, 5)
        begun.signal(signal.SIGTERM)
        assert begun.codes() == [75] * ranks[0]
        assert metrics(tmp_path / run)[-1]["step"] < STEPS
        assert train_on(ranks[1], recipe).codes() == [0] * ranks[1]
        found = metrics(tmp_path / run)
        assert [[r[k] for k in KEYS] for r in found] == [[r[k] for k in KEYS] for r in wanted]
        numbers = ("loss", "grad_norm", *(["z_loss"] if name == "muon" else []))
        within = 0 if run == "same" else CLOSE
        for a, b in zip(found, wanted, strict=True):
            assert all(abs(a[key] - b[key]) <= within for key in numbers)
            assert name == "sgd" or a["z_loss"] > 0
    assert whole_state(tmp_path / "same") == whole_state(tmp_path / "reference"), "state, bit by bit"
    assert wanted[-1]["loss"] < wanted[0]["loss"] - 0.05


def test_the_average_is_exported_and_a_run_without_one_says_so(write_recipe, tmp_path: Path, capsys) -> None:
    settings = {"learning_rate = 3e-3": MUON}
    assert train_on(2, write_recipe("run", "llama", 6, settings)).codes() == [0, 0]
    path = step_directory(tmp_path / "run", 6)
    now, averaged = dict(SavedTensors(path)), dict(SavedTensors(path, averaged=True))
    assert now.keys() == averaged.keys()
    assert not any(torch.equal(now[name], averaged[name]) for name in now if "weight" in name)
    assert cli.run(["export", str(tmp_path / "run"), "--to", str(tmp_path / "model"), "--ema"]) == 0
    assert "the average of the model" in capsys.readouterr().out
    exported = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(tensor, averaged[name]) for name, tensor in exported.items())

    assert train_on(1, write_recipe("plain", "llama", 6)).codes() == [0]
    assert cli.run(["export", str(tmp_path / "plain"), "--to", str(tmp_path / "none"), "--ema"]) == 1
    assert "no average of the weights; it was trained without optimizer.ema" in capsys.readouterr().err


def train_and_print(text: str, to: Path) -> int:
    import contextlib

    with to.open("w") as file, contextlib.redirect_stdout(file):
        return train_text(text)


def test_the_groups_are_printed_once_and_written_down(write_recipe, tmp_path: Path) -> None:
    recipe = read_recipe(write_recipe("run", "llama", 5, {"learning_rate = 3e-3": MUON}))
    said = tmp_path / "said.txt"
    assert Ranks(1, train_and_print, schema.to_toml(recipe), said).codes() == [0]
    lines = [
        line.split() for line in said.read_text().splitlines() if line.startswith(("lm_head", "matrices"))
    ]
    assert lines == [
        [
            "matrices",
            "of",
            "blocks",
            "muon",
            "0.003",
            "0.1",
            "14",
            "20,480",
            "model.layers.0.self_attn.q_proj.weight",
        ],
        ["lm_head.*", "sgd", "0.02", "0.1", "1", "12,288", "lm_head.weight"],
    ]
    groups = json.loads((tmp_path / "run" / "parameter_groups.json").read_text())
    assert {group["rule"] for group in groups} == {
        "matrices of blocks",
        "other weights",
        "lm_head.*",
        "*norm.weight",
    }
    names = [name for group in groups for name in group["parameters"]]
    assert len(names) == len(set(names)) == 21
    plain = train_on(1, write_recipe("plain", "llama", 5))
    assert plain.codes() == [0]
    assert len(json.loads((tmp_path / "plain" / "parameter_groups.json").read_text())) == 2


def test_a_pattern_that_names_nothing_stops_before_the_first_step(write_recipe, tmp_path: Path) -> None:
    settings = {
        "learning_rate = 3e-3": 'learning_rate = 3e-3\n[[optimizer.groups]]\npattern = "*.embeddings.*"'
    }
    ranks = train_on(2, write_recipe("run", "llama", 6, settings))
    assert ranks.codes() == [1, 1]
    assert "no parameter matches '*.embeddings.*'; near it: model.embed_tokens.weight" in ranks.error()
    assert not metrics(tmp_path / "run")
