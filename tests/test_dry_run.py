"""What `flame train --dry-run` says of a layout, against what was measured and what real shards are."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
import tomli_w
from small_recipes import WriteRecipe

from flame import cli
from flame.guest import check_fits
from flame.memory_plan import RESERVED, part_of, plan_layout, pretended
from flame.models.build import build_on_meta
from flame.models.registry import family_of
from flame.origin import model_config
from flame.parallel.mesh import resolve_layout
from flame.recipe import read_recipe

ROOT = Path(__file__).parents[1]
GIB = 2**30


@pytest.mark.parametrize("name", ["gla", "transformer"])
def test_the_memory_of_the_340m_models_is_what_an_h100_held(name: str) -> None:
    measured = json.loads((ROOT / "benchmarks/results/h100-340M.json").read_text())["flame"]
    [peak, *_] = [run["memory_gib"] for run in measured if run["name"].startswith(name)]
    plan = plan_layout(read_recipe(ROOT / f"configs/recipes/{name}_340M.toml"), 1)
    assert (plan.most.total - RESERVED) / GIB == pytest.approx(peak, rel=0.05)


@pytest.mark.parametrize("ways", [{}, {"replicate": 2}, {"pipeline": 2}, {"tensor": 2}, {"context": 2}])
def test_the_ranks_of_a_copy_hold_every_parameter(ways: dict[str, int], write_recipe: WriteRecipe) -> None:
    sizes = "\n".join(f"{name} = {size}" for name, size in ways.items())
    path = write_recipe("run", "llama", replaced={"[logging]": f"[parallel]\n{sizes}\n[logging]"})
    recipe, ranks = read_recipe(path), 6
    config = model_config(recipe)
    family, layout = family_of(config), resolve_layout(recipe.parallel, ranks)
    whole = build_on_meta(config)
    total = sum(parameter.numel() for parameter in whole.parameters())
    held: dict[str, int] = {}
    for rank in range(ranks):
        with pretended(rank, ranks) as world:
            stages = check_fits(recipe, world, family, config, layout)
            part = part_of(recipe, family, config, whole, layout, stages, rank)
        for name, size in part.local.items():
            held[name] = held.get(name, 0) + size
    expected = {name: p.numel() * layout.replicate for name, p in whole.named_parameters()}
    norms = {name for name, p in whole.named_parameters() if p.ndim == 1}
    for name, size in expected.items():  # every tensor rank has the norms
        assert held[name] == size * (layout.tensor if name in norms else 1), name
    assert sum(expected.values()) == total * layout.replicate


def big(tmp_path: Path, **batch: int) -> Path:
    recipe = {
        "run": {"directory": str(tmp_path / "run"), "steps": 10},
        "model": {"config": str(ROOT / "configs/models/transformer_7B.json")},
        "tokenizer": {"path": "bytes"},
        "data": {"sequence_length": 4096, "sources": [{"name": "a", "files": "nowhere.jsonl"}]},
        "batch": {"tokens_per_step": 2**22, "micro_batch_rows": 1, **batch},
    }
    path = tmp_path / "recipe.toml"
    path.write_text(tomli_w.dumps(recipe))
    assert tomllib.loads(path.read_text())
    return path


def test_thousands_of_ranks_are_planned_without_any(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    flags = ["--parallel.replicate", "16", "--parallel.tensor", "4", "--parallel.pipeline", "2"]
    recipe = str(big(tmp_path, tokens_per_step=2**24))
    assert cli.run(["train", recipe, "--dry-run", "--nproc", "2048", "--json", *flags]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["fits"] and told["layout"]["shard"] == 16
    assert [rank["rank"] for rank in told["ranks"]] == [0, 1024]
    of_one = told["model_parameters"] / (16 * 4 * 2)
    assert all(rank["parameters"] == pytest.approx(of_one, rel=0.1) for rank in told["ranks"])
    assert all(told["traffic"][way] > 0 for way in ("shard", "replicate", "tensor", "pipeline"))
    assert told["traffic"]["context"] == 0
    assert not (tmp_path / "run").exists()


def test_what_does_not_fit_is_said_with_what_would_help(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert cli.run(["train", str(big(tmp_path)), "--dry-run"]) == 1
    assert "share the model over more ranks" in capsys.readouterr().out
    rows = str(big(tmp_path, micro_batch_rows=16))
    assert cli.run(["train", rows, "--dry-run", "--nproc", "64"]) == 1
    assert "lower batch.micro_batch_rows" in capsys.readouterr().out
    options = ["--nproc", "64", "--memory.recompute", "full"]
    assert cli.run(["train", rows, "--dry-run", *options]) == 0
    assert "fits: " in capsys.readouterr().out
    assert cli.run(["train", rows, "--dry-run", "--nproc", "6", "--parallel.tensor", "4"]) == 1
    assert "tensor 4 does not divide the 6 ranks" in capsys.readouterr().err


def test_gradients_reduced_with_every_micro_batch_take_less_memory_and_more_traffic(tmp_path: Path) -> None:
    path = big(tmp_path)  # 64 ranks have 16 micro-batches
    once = plan_layout(read_recipe(path), 64)
    each = plan_layout(read_recipe(path, {"parallel.reduce": "micro_batch"}), 64)
    assert once.micro_batches == each.micro_batches == 16
    size = once.model_parameters
    # the whole float32 gradient, but for that of what is reduced at once
    saved = once.most.gathered - each.most.gathered
    assert 0.9 * 4 * size < saved < 4 * size
    assert each.most.gradients == once.most.gradients == pytest.approx(4 * size / 64, rel=0.01)
    sent = each.traffic.shard - once.traffic.shard
    assert sent == pytest.approx(15 * 4 * size * 63 / 64, rel=1e-6)


def test_parameters_that_stay_gathered_take_more_memory_and_less_traffic(tmp_path: Path) -> None:
    path = big(tmp_path)
    plans = {
        reshard: plan_layout(read_recipe(path, {"parallel.reshard": reshard}), 64)
        for reshard in ("auto", "forward", "micro_batch", "step")
    }
    assert plans["auto"] == plans["forward"]
    size = plans["auto"].model_parameters
    kept = plans["micro_batch"].most.gathered - plans["forward"].most.gathered
    assert 0.9 * 2 * size < kept < 2 * size
    assert plans["step"].most == plans["micro_batch"].most
    sent = {reshard: plan.traffic.shard / (size * 63 / 64) for reshard, plan in plans.items()}
    assert sent["step"] == pytest.approx(2 + 4, rel=1e-6)
    assert sent["micro_batch"] == pytest.approx(16 * 2 + 4, rel=1e-6)
    assert 0.95 * (32 * 2 + 4) < sent["forward"] < 32 * 2 + 4


def test_a_stage_of_a_pipeline_holds_its_blocks_gathered_for_a_step(tmp_path: Path) -> None:
    plan = plan_layout(read_recipe(big(tmp_path), {"parallel.pipeline": "2"}), 64)
    of_stage = plan.ranks[1].parameters * 32
    assert plan.ranks[1].gathered == pytest.approx((2 + 4) * of_stage, rel=1e-3)
    most = max(rank.parameters for rank in plan.ranks) * 32
    assert plan.traffic.shard == pytest.approx((2 + 4) * most * 31 / 32, rel=1e-3)
