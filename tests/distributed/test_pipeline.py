"""A pipeline trains what one process trains: every family, every schedule, beside sharding, and resumed."""

from __future__ import annotations

import json
import math
import tomllib
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from distributed.ranks import Ranks, metrics, train_on
from models.small_models import initialized, untied
from small_recipes import MODELS

from flame import schema
from flame.models.registry import families, load_config
from flame.parallel.world import join_world
from flame.recipe import Recipe, read_recipe
from flame.run import build_guest, open_data
from flame.train.checkpoint import load_tensors, step_directory
from flame.train.rehearsal import made_up_batch
from flame.train.saved_tensors import SavedTensors
from flame.train.step import train_step

# what is special about a family's stages, one of each in every run of the tests; the rest in `make test-all`
QUICK = ("gla", "llama", "rwkv7", "hgrn2", "mamba2", "gpt2")
NAMES = [
    pytest.param(family.name, marks=() if family.name in QUICK else pytest.mark.slow)
    for family in families()
    if family.pipeline
]
SHORT = {"steps = 30": "steps = 4", 'warmup = "5 steps"': 'warmup = "2 steps"'}


@pytest.fixture
def recipe_of(write_recipe, monkeypatch):
    """Writes the recipe of a small model of a family, with so many blocks, on a layout."""

    def write(
        run: str, name: str, *, blocks: int = 2, replaced: dict[str, str] | None = None, **parallel
    ) -> Path:
        values = untied(name, blocks, vocab_size=384).to_dict()
        monkeypatch.setitem(MODELS, name, json.loads(json.dumps(values)))
        lines = [f"{key} = {json.dumps(value)}" for key, value in parallel.items()]
        section = "\n".join(["[parallel]", *lines, "[checkpoint]"])
        return write_recipe(run, name, replaced=SHORT | {"[checkpoint]": section} | (replaced or {}))

    return write


def trained(ranks: int, recipe: Path) -> None:
    trainer = train_on(ranks, recipe)
    logs = sorted((recipe.with_suffix("") / "logs").glob("rank-*.log"))
    assert trainer.codes() == [0] * ranks, "\n".join(log.read_text() for log in logs)


def compare(alone: Path, piped: Path, steps: int = 4) -> None:
    one, two = metrics(alone), metrics(piped)
    assert len(one) == len(two) == steps
    for a, b in zip(one, two, strict=True):
        assert a["rows_digest"] == b["rows_digest"]
        assert b["loss"] == pytest.approx(a["loss"], abs=2e-6)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_family_trains_the_same_on_two_stages(name, recipe_of, tmp_path: Path) -> None:
    trained(1, recipe_of("alone", name))
    trained(2, recipe_of("piped", name, pipeline=2))
    compare(tmp_path / "alone", tmp_path / "piped")


FOUR_STAGES = [
    pytest.param("gla", ["zero_bubble"]),
    pytest.param("rwkv7", ["interleaved", "zbv"]),
    *(
        pytest.param(name, ["gpipe", "1f1b", "interleaved", "zero_bubble", "zbv"], marks=pytest.mark.slow)
        for name in ("llama", "gla", "gated_deltanet", "hgrn2", "rwkv7", "mamba2", "gemma3_text", "kda")
    ),
]


@pytest.mark.parametrize(("name", "schedules"), FOUR_STAGES)
def test_every_schedule_trains_the_same(name, schedules, recipe_of, tmp_path: Path) -> None:
    trained(1, recipe_of("alone", name, blocks=4))
    for schedule in schedules:
        trained(2, recipe_of(schedule, name, blocks=4, pipeline=2, pipeline_schedule=schedule))
        compare(tmp_path / "alone", tmp_path / schedule)


BESIDE = [
    pytest.param("llama", {"shard": 2}),
    pytest.param("gated_deltanet", {"shard": 2}, marks=pytest.mark.slow),
    pytest.param("gla", {"replicate": 2}, marks=pytest.mark.slow),
    pytest.param("rwkv7", {"shard": 2, "pipeline_schedule": "interleaved"}, marks=pytest.mark.slow),
    pytest.param("hgrn2", {"shard": 2, "pipeline_schedule": "zero_bubble"}, marks=pytest.mark.slow),
    pytest.param("llama", {"replicate": 2, "pipeline_schedule": "zbv"}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("name", "beside"), BESIDE)
def test_a_pipeline_beside_other_ways_trains_the_same(name, beside, recipe_of, tmp_path: Path) -> None:
    trained(1, recipe_of("alone", name, blocks=4))
    trained(4, recipe_of("piped", name, blocks=4, pipeline=2, **beside))
    compare(tmp_path / "alone", tmp_path / "piped")


@pytest.mark.slow
def test_four_ranks_with_an_uneven_split_train_the_same(recipe_of, tmp_path: Path) -> None:
    trained(1, recipe_of("alone", "rwkv7", blocks=6))
    trained(4, recipe_of("piped", "rwkv7", blocks=6, pipeline=4, pipeline_split=[1, 3, 1, 1]))
    compare(tmp_path / "alone", tmp_path / "piped")


@pytest.mark.parametrize(("ranks", "then"), [(2, 1), (1, 2)])
def test_a_run_goes_on_at_another_number_of_stages(ranks, then, recipe_of, tmp_path: Path) -> None:
    parallel = {1: {}, 2: {"pipeline": 2, "pipeline_schedule": "interleaved"}}
    trained(1, recipe_of("alone", "gla", blocks=4))
    half = {"steps = 4\n[model]": "steps = 2\n[model]"}
    trained(ranks, recipe_of("moved", "gla", blocks=4, replaced=half, **parallel[ranks]))
    trained(then, recipe_of("moved", "gla", blocks=4, **parallel[then]))
    compare(tmp_path / "alone", tmp_path / "moved")


def test_stages_hold_the_whole_models_bits(recipe_of) -> None:
    """Initial and loaded parameters are those of one process, and each rank has its stages' alone."""
    recipe = recipe_of("alone", "hgrn2", blocks=4)
    trained(1, recipe)
    piped = recipe_of("alone", "hgrn2", blocks=4, pipeline=2, pipeline_schedule="interleaved")
    assert Ranks(2, holds_the_same, schema.to_toml(read_recipe(piped))).codes() == [0, 0]


def holds_the_same(text: str) -> int:
    recipe = schema.build(Recipe, tomllib.loads(text), "recipe")
    world = join_world()
    config = load_config(recipe.model.config)
    guest = build_guest(recipe, world, open_data(recipe, world).catalog, config)
    names = world.gather([piece.name for piece in guest.shards.pieces])
    fresh = initialized(config, recipe.run.seed).state_dict()
    assert sorted(names[0] + names[1]) == sorted(fresh)
    blocks = [{int(n.split(".")[2]) for n in stage if n.startswith("model.layers.")} for stage in names]
    assert blocks == [{0, 2}, {1, 3}]
    saved = dict(SavedTensors(step_directory(recipe.directory, 4)))
    for wanted in (fresh, saved):
        for piece in guest.shards.pieces:
            assert torch.equal(piece.master().full_tensor(), wanted[piece.name]), piece.name
        path = step_directory(recipe.directory, 4)
        load_tensors(guest.model, guest.shards, guest.optimizer, path, world.checkpoint)
    assert all(int(state["step"]) == 4 for state in guest.optimizer.state.values())
    assert guest.size == sum(parameter.numel() for parameter in fresh.values())
    dist.destroy_process_group()
    return 0


def test_a_gradient_that_is_not_finite_on_one_stage_stops_the_update_on_all(recipe_of) -> None:
    recipe = recipe_of("poisoned", "llama", blocks=4, pipeline=2)
    assert Ranks(2, poisoned, schema.to_toml(read_recipe(recipe))).codes() == [0, 0]


def poisoned(text: str) -> int:
    """The last stage's gradient is infinite; a step before that, how many buffers are held."""
    recipe = schema.build(Recipe, tomllib.loads(text), "recipe")
    world = join_world()
    guest = build_guest(recipe, world, open_data(recipe, world).catalog, load_config(recipe.model.config))
    batches = [made_up_batch(1, 64, 40, 384, world.device, seed=n) for n in range(7)]
    held: list[int] = []
    stage_module = cast("Any", guest.passes).modules[0]
    stage_module.register_forward_hook(lambda *_: held.append(buffers_held(guest.passes)))

    def step():
        arguments = {"predicted": 100, "clip_norm": 1.0, "seed": (1, 1)}
        return train_step(guest.passes, guest.shards, guest.optimizer, batches, **arguments)

    result = step()
    assert world.gather(result.grad_norm.item()) == [result.grad_norm.item()] * 2
    losses = world.gather(result.loss_sum.item())
    assert losses[0] == 0 < losses[1]
    assert len(held) == 7
    assert max(held) <= 1  # what comes is received when its turn comes, and is nobody's afterwards
    assert buffers_held(guest.passes) == 0

    counts = [int(state["step"]) for state in guest.optimizer.state.values()]
    assert set(counts) == {1}
    before = [piece.local.detach().clone() for piece in guest.shards.pieces]
    if world.rank == 1:
        head = next(piece for piece in guest.shards.pieces if piece.name == "lm_head.weight")
        with torch.no_grad():
            head.local[0, 0] = before[guest.shards.pieces.index(head)][0, 0] = math.inf
    assert not math.isfinite(step().grad_norm.item())
    for piece, old in zip(guest.shards.pieces, before, strict=True):
        assert torch.equal(piece.local, old), piece.name
    assert [int(state["step"]) for state in guest.optimizer.state.values()] == counts
    dist.destroy_process_group()
    return 0


def buffers_held(passes: Any) -> int:
    """Memory that a rank's stage has to receive into."""
    stage = passes._made[1]._stage
    infos = [
        info for table in (stage.args_recv_info, stage.grad_recv_info) for of in table.values() for info in of
    ]
    return sum(not info.buffer.is_meta for info in infos if info.buffer is not None)


SMALL_STEPS = {"tokens_per_step = 768": "tokens_per_step = 768\nmicro_batch_rows = 6"}
COMPILED = {"[tokenizer]": "compile = true\n[tokenizer]"}


@pytest.mark.parametrize(
    ("settings", "replaced", "words"),
    [
        ({"pipeline_split": [3, 2]}, {}, ["parallel.pipeline_split", "4 blocks"]),
        ({"pipeline_schedule": "zbv"}, SMALL_STEPS, ["zbv on 2 ranks", "has 2"]),
        ({"pipeline_schedule": "zero_bubble"}, COMPILED, ["model.compile: true"]),
    ],
)
def test_what_a_pipeline_cannot_do_is_said_before_the_start(settings, replaced, words, recipe_of) -> None:
    ranks = train_on(2, recipe_of("refused", "llama", blocks=4, replaced=replaced, pipeline=2, **settings))
    assert ranks.codes() == [1, 1]
    message = ranks.error()
    for word in words:
        assert word in message
