"""Several optimizers as one: on any ranks, through updates that are left out, with an average beside."""

from __future__ import annotations

import math

import pytest
import torch
import torch.distributed as dist
from distributed.ranks import Ranks
from torch import nn
from train.test_step import Tiny, guest, hidden, predicted, rows, shapes_of

from flame.batch import Batch
from flame.parallel.config import ParallelConfig
from flame.parallel.fsdp import shard
from flame.parallel.mesh import data_mesh, resolve_layout
from flame.parallel.world import join_world
from flame.train.config import GroupConfig, OptimizerConfig
from flame.train.groups import group_parameters
from flame.train.loss import LossModule
from flame.train.optimizer import Optimizers, build_optimizer, set_learning_rate
from flame.train.shards import Shards, WholeModel
from flame.train.step import train_step

MIXED = OptimizerConfig(
    name="muon",
    learning_rate=0.02,
    adamw_learning_rate=0.005,
    ema=0.9,
    groups=[GroupConfig("head.*", name="sgd", learning_rate_factor=4.0)],
)
CONFIGS = {
    "adamw": OptimizerConfig(ema=0.9),
    "sgd": OptimizerConfig(name="sgd", learning_rate=0.1, ema=0.9),
    "muon": OptimizerConfig(name="muon", learning_rate=0.02, ema=0.9),
    "mixed": MIXED,
}


def optimizer_of(shards: Shards, config: OptimizerConfig, *, fused: bool = False) -> Optimizers:
    groups = group_parameters(
        config,
        shapes_of(shards),
        undecayed={"block.bias"},
        matrices={"block.weight"},
        embeddings={"embedding.weight"},
    )
    return build_optimizer(shards, config, groups, fused=fused)


def state_of(shards: Shards, optimizer: Optimizers) -> dict[str, torch.Tensor]:
    """Parameters and their optimizer state, whole, as a checkpoint names them."""
    found = {piece.name: piece.master() for piece in shards.pieces}
    for piece in shards.pieces:
        held = optimizer.state.get(piece.local, {})
        found |= {f"{piece.name}.{key}": piece.as_shard(value) for key, value in held.items()}
    whole = {k: t.full_tensor() if hasattr(t, "full_tensor") else t for k, t in found.items()}
    return {key: tensor.clone() for key, tensor in whole.items()}


def step(model: nn.Module, shards: Shards, optimizer: Optimizers, batches: list[Batch], count: int) -> float:
    result = train_step(model, shards, optimizer, batches, predicted=count, clip_norm=1.0, seed=(0, 1))
    return result.grad_norm.item()


def batches_of(number: int, rank: int) -> list[Batch]:
    return [rows(3 * rank + number % 3, 2)]


def alone(config: OptimizerConfig, ranks: int, steps: int) -> dict[str, torch.Tensor]:
    """What one process makes of the rows of `ranks` ranks."""
    model = guest()
    shards = WholeModel(model, torch.float32)
    optimizer = optimizer_of(shards, config)
    module = LossModule(model, hidden, model.head)
    for number in range(steps):
        batches = [batch for rank in range(ranks) for batch in batches_of(number, rank)]
        step(module, shards, optimizer, batches, predicted(batches))
    return state_of(shards, optimizer)


def sharded_steps(replicate: int, config: OptimizerConfig) -> int:
    world = join_world()
    wanted = alone(config, world.size, 4)
    model = guest()
    module = LossModule(model, hidden, model.head)
    layout = resolve_layout(ParallelConfig(replicate, -1), world.size)
    shard(module, [model.block], data_mesh(layout, "cpu"), torch.float32)
    shards = Shards(model)
    optimizer = optimizer_of(shards, config)
    for number in range(4):
        count = predicted([b for rank in range(world.size) for b in batches_of(number, rank)])
        step(module, shards, optimizer, batches_of(number, world.rank), count)
    found = state_of(shards, optimizer)
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(
            tensor, wanted[name], rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
    dist.destroy_process_group()
    return 0


@pytest.mark.parametrize("name", ["sgd", "mixed"])
def test_sharded_steps_with_other_optimizers_equal_one_process(name: str) -> None:
    for size, replicate in [(2, 1), (4, 1), (4, 2)]:
        codes = Ranks(size, sharded_steps, replicate, CONFIGS[name]).codes()
        assert codes == [0] * size, (size, replicate)


def test_each_groups_rate_is_its_multiple_of_the_schedules() -> None:
    shards = Shards(guest())
    optimizer = optimizer_of(shards, MIXED)
    set_learning_rate(optimizer, 0.01)
    found = {name: g["lr"] for g in optimizer.param_groups for name in g["names"]}
    assert found == {
        "block.weight": 0.01,
        "block.bias": pytest.approx(0.0025),
        "embedding.weight": pytest.approx(0.0025),
        "head.weight": pytest.approx(0.01),  # four times AdamW's
    }
    assert {g["lr"] for part in optimizer.parts for g in part.param_groups} == {
        g["lr"] for g in optimizer.param_groups
    }


def test_the_average_begins_at_the_initial_weights_and_follows_each_update() -> None:
    model = guest()
    shards = WholeModel(model, torch.bfloat16)
    optimizer = optimizer_of(shards, MIXED)
    module = LossModule(model, hidden, model.head)
    averages = [piece.local.detach().clone() for piece in shards.pieces]
    for number in range(3):
        batches = batches_of(number, 0)
        step(module, shards, optimizer, batches, predicted(batches))
        for piece, average in zip(shards.pieces, averages, strict=True):
            average.lerp_(piece.local.detach(), 0.1)
            assert torch.equal(optimizer.state[piece.local]["ema"], average)
            assert optimizer.state[piece.local]["ema"].dtype == torch.float32


# --------------------------------------------------------------------- updates that are left out


def spoil(model: Tiny) -> torch.Tensor:
    """Makes the next gradients NaN; the values to put back."""
    weight = next(model.block.parameters())
    local = weight.to_local() if hasattr(weight, "to_local") else weight  # type: ignore[union-attr]
    kept = local.detach().clone()
    with torch.no_grad():
        local.fill_(math.nan)
    return kept


def poisoned_steps(config: OptimizerConfig) -> int:
    """Between two good steps one whose gradient is NaN on one rank."""
    world = join_world()
    model = guest()
    module = LossModule(model, hidden, model.head)
    shard(module, [model.block], data_mesh(resolve_layout(ParallelConfig(), 2), "cpu"), torch.float32)
    shards = Shards(model)
    optimizer = optimizer_of(shards, config)
    step(module, shards, optimizer, batches_of(0, world.rank), 28)
    before = state_of(shards, optimizer)
    kept = spoil(model) if world.rank == 1 else None
    assert math.isnan(step(module, shards, optimizer, batches_of(1, world.rank), 28))
    if kept is not None:
        with torch.no_grad():
            next(model.block.parameters()).to_local().copy_(kept)
    after = state_of(shards, optimizer)
    assert after.keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    assert math.isfinite(step(module, shards, optimizer, batches_of(2, world.rank), 28))
    assert any(not torch.equal(t, before[name]) for name, t in state_of(shards, optimizer).items())
    dist.destroy_process_group()
    return 0


@pytest.mark.parametrize("name", CONFIGS)
def test_a_gradient_that_is_not_finite_leaves_parameters_and_state_on_all_ranks(name: str) -> None:
    assert Ranks(2, poisoned_steps, CONFIGS[name]).codes() == [0, 0]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_device_itself_leaves_out_an_update_as_on_gpus(name: str, first: bool) -> None:
    """What a step does with `found_inf`, with torch's fused kernels, whose CPU form knows it too."""
    results: list[dict[str, torch.Tensor]] = []
    for bad_at in (0 if first else 1, None):
        model = guest()
        shards = Shards(model)
        optimizer = optimizer_of(shards, CONFIGS[name], fused=True)
        good = 0
        for number in range(3):
            bad = number == bad_at
            if bad_at is None and number == 2:
                break
            torch.manual_seed(10 + good)
            for piece in shards.pieces:
                piece.local.grad = torch.randn_like(piece.local)
                if bad:
                    piece.local.grad.fill_(math.nan)
            optimizer.found_inf = torch.tensor(float(bad))
            before = state_of(shards, optimizer)
            optimizer.step()
            if bad:
                after = state_of(shards, optimizer)
                assert all(torch.equal(after[key], tensor) for key, tensor in before.items())
            good += not bad
        results.append(state_of(shards, optimizer))
    assert results[0].keys() == results[1].keys()
    assert all(torch.equal(tensor, results[1][key]) for key, tensor in results[0].items())
