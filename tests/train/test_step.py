"""One step: gradient norms over sharded parameters, clipping, and updates that are left out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed.ranks import Ranks
from torch import nn
from torch.distributed.fsdp import FSDPModule

from flame.batch import IGNORED, Batch
from flame.parallel.config import ParallelConfig
from flame.parallel.fsdp import shard
from flame.parallel.mesh import build_meshes, resolve_layout
from flame.parallel.world import join_world
from flame.train.config import OptimizerConfig
from flame.train.groups import group_parameters
from flame.train.loss import LossModule
from flame.train.optimizer import Optimizers, build_optimizer, set_learning_rate
from flame.train.shards import Shards, WholeModel
from flame.train.step import train_step

VOCABULARY, WIDTH, LENGTH = 50, 12, 8


class Tiny(nn.Module):
    """An odd-sized guest, so that shards are uneven."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.block = nn.Linear(WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)


def hidden(model: nn.Module, tokens: torch.Tensor, *_: object) -> torch.Tensor:
    assert isinstance(model, Tiny)
    return torch.tanh(model.block(model.embedding(tokens)))


def rows(seed: int, count: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCABULARY, (count, LENGTH), generator=generator)
    labels = tokens.roll(-1, 1)
    labels[:, -1] = IGNORED
    labels[0, : 1 + seed] = IGNORED  # rows of unequal weight
    return Batch(tokens, labels, torch.arange(LENGTH).expand(count, -1), torch.tensor([0]), LENGTH, seed)


def predicted(batches: list[Batch]) -> int:
    return sum(int((b.labels != IGNORED).sum()) for b in batches)


def guest() -> Tiny:
    torch.manual_seed(1)
    return Tiny()


def shapes_of(shards: Shards) -> dict[str, tuple[int, ...]]:
    return {piece.name: tuple(piece.parameter.shape) for piece in shards.pieces}


def adamw_of(shards: Shards) -> Optimizers:
    config = OptimizerConfig()
    groups = group_parameters(config, shapes_of(shards), undecayed={"block.bias"})
    return build_optimizer(shards, config, groups, fused=False)


def plain_step(batches: list[Batch], clip_norm: float) -> tuple[float, list[torch.Tensor]]:
    """The same in plain torch on one process."""
    model = guest()
    module = LossModule(model, hidden, model.head)
    optimizer = adamw_of(shards := Shards(model))
    total = sum((module(b) for b in batches), torch.zeros(()))
    (total / predicted(batches)).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm).item()
    shards.take_gradients()
    optimizer.step()
    return norm, [p.detach() for p in model.parameters()]


class Watched(Shards):
    """Counts, after each micro-batch, the gradients of whole parameters that wait to be reduced."""

    def __init__(self, module: LossModule, reduce_each: bool) -> None:
        super().__init__(module.guest, reduce_each=reduce_each)
        self.whole_gradients: list[int] = []
        units: list[Any] = [unit for unit in module.modules() if isinstance(unit, FSDPModule)]
        groups: list[Any] = [unit._get_fsdp_state()._fsdp_param_group for unit in units]
        self._kept = [parameter for group in groups for parameter in group.fsdp_params]

    def collect(self) -> None:
        self.whole_gradients.append(sum(p.unsharded_accumulated_grad is not None for p in self._kept))


def sharded_step(replicate: int, clip_norm: float, reduce_each: bool) -> int:
    """Every rank takes two micro-batches; the result must be that of one process."""
    world = join_world()
    batches = [[rows(4 * r + i, 2) for i in range(2)] for r in range(world.size)]
    flat = [b for mine in batches for b in mine]
    norm, wanted = plain_step(flat, clip_norm)
    model = guest()
    module = LossModule(model, hidden, model.head)
    layout = resolve_layout(ParallelConfig(replicate, -1), world.size)
    shard(module, [model.block], build_meshes(layout, "cpu").data, torch.float32)
    shards = Watched(module, reduce_each)
    optimizer = adamw_of(shards)
    result = train_step(
        module,
        shards,
        optimizer,
        batches[world.rank],
        predicted=predicted(flat),
        clip_norm=clip_norm,
        seed=(0, 1),
    )
    torch.testing.assert_close(result.grad_norm.item(), norm, rtol=1e-5, atol=0)
    for parameter, other in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.full_tensor(), other, rtol=1e-4, atol=1e-6)
    assert shards.whole_gradients == [0 if reduce_each else len(shards.pieces), 0]
    dist.destroy_process_group()
    return 0


@pytest.mark.parametrize("reduce_each", [False, True])
def test_sharded_and_accumulated_steps_equal_one_process(reduce_each: bool) -> None:
    for size, replicate in [(1, 1), (2, 1), (3, 1), (4, 2), (2, 2)]:
        works = Ranks(size, sharded_step, replicate, 0.05, reduce_each)
        assert works.codes() == [0] * size, (size, replicate)


def test_an_update_that_is_not_finite_is_left_out() -> None:
    assert Ranks(2, poisoned_step).codes() == [0, 0]


def poisoned_step() -> int:
    """One rank's gradient is NaN: no rank moves, and the optimizer does not count the step."""
    world = join_world()
    model = guest()
    module = LossModule(model, hidden, model.head)
    shard(module, [model.block], build_meshes(resolve_layout(ParallelConfig(), 2), "cpu").data, torch.float32)
    shards = Shards(model)
    optimizer = adamw_of(shards)
    set_learning_rate(optimizer, 0.1)
    if world.rank == 1:
        with torch.no_grad():
            next(model.block.parameters()).to_local().fill_(math.nan)
    before = [p.to_local().clone() for p in model.parameters()]
    result = train_step(module, shards, optimizer, [rows(1, 2)], predicted=14, clip_norm=1.0, seed=(0, 1))
    assert math.isnan(result.grad_norm.item())
    for parameter, old in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(parameter.to_local(), old, equal_nan=True)
    assert not optimizer.state
    dist.destroy_process_group()
    return 0


def test_the_norm_of_a_plain_model_is_torchs() -> None:
    model = nn.Linear(7, 5)
    model(torch.randn(3, 7)).square().sum().backward()
    wanted = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    shards = Shards(model)
    shards.take_gradients()
    torch.testing.assert_close(shards.gradient_norm(), wanted)


@pytest.mark.parametrize("compute", [torch.float32, torch.bfloat16])
def test_one_rank_alone_trains_float32_parameters_and_computes_with_copies(compute: torch.dtype) -> None:
    batches = [rows(i, 2) for i in range(3)]
    count = predicted(batches)
    norm, wanted = plain_step(batches, 0.05)
    model = guest()
    module = LossModule(model, hidden, model.head)
    shards = WholeModel(model, compute)
    optimizer = adamw_of(shards)
    result = train_step(module, shards, optimizer, batches, predicted=count, clip_norm=0.05, seed=(0, 1))
    exact = compute == torch.float32
    torch.testing.assert_close(result.grad_norm.item(), norm, rtol=1e-5 if exact else 2e-2, atol=0)
    for piece, other in zip(shards.pieces, wanted, strict=True):
        assert piece.local.dtype == torch.float32
        assert piece.parameter.dtype == compute
        # Adam's first step moves each value by the learning rate, whatever the gradient's size
        torch.testing.assert_close(piece.local, other, rtol=1e-4, atol=1e-6 if exact else 2.1e-3)
        torch.testing.assert_close(piece.parameter, piece.local.to(compute), rtol=0, atol=0)
