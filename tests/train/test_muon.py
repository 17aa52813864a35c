"""Muon sees whole matrices: sharded over any ranks it is torch.optim.Muon on one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed.ranks import Ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from flame.parallel.config import ParallelConfig
from flame.parallel.mesh import data_mesh, resolve_layout
from flame.parallel.world import join_world
from flame.train import muon
from flame.train.muon import Muon, newton_schulz_flops, owners_of, split_evenly
from flame.train.shards import Shards

SHAPES = [(7, 5), (5, 9), (16, 16), (3, 8), (1, 6), (12, 4)]  # fewer rows than ranks too
RATE, DECAY, MOMENTUM, STEPS = 0.02, 0.1, 0.95, 3
CLOSE = {"rtol": 0, "atol": 2e-7}  # one rounding of float32: torch multiplies and adds in one go


def matrices() -> nn.ParameterList:
    torch.manual_seed(1)
    return nn.ParameterList([nn.Parameter(torch.randn(shape)) for shape in SHAPES])


def gradients(step: int) -> list[torch.Tensor]:
    torch.manual_seed(100 + step)
    return [torch.randn(shape) for shape in SHAPES]


def by_torch(adjust_lr_fn: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Parameters and momentum after STEPS steps of torch's own, on whole matrices."""
    model = matrices()
    optimizer = torch.optim.Muon(
        model.parameters(), lr=RATE, weight_decay=DECAY, momentum=MOMENTUM, adjust_lr_fn=adjust_lr_fn
    )
    for step in range(STEPS):
        for parameter, gradient in zip(model, gradients(step), strict=True):
            parameter.grad = gradient
        optimizer.step()
    return [p.detach() for p in model], [optimizer.state[p]["momentum_buffer"] for p in model]


def as_placed(whole: torch.Tensor, like: Any) -> torch.Tensor:
    """A tensor that every rank has whole, as the parameter `like` is placed."""
    if not isinstance(like, DTensor):
        return whole
    everywhere = DTensor.from_local(whole, like.device_mesh, [Replicate()] * like.device_mesh.ndim)
    return everywhere.redistribute(placements=like.placements)


def train(model: nn.Module, adjust_lr_fn: str) -> None:
    """The same steps by flame's, on whatever this rank has of the model; compared with torch's."""
    shards = Shards(model)
    group = {"params": [p.local for p in shards.pieces], "lr": RATE, "weight_decay": DECAY}
    optimizer = Muon([group], shards.pieces, momentum=MOMENTUM, adjust_lr_fn=adjust_lr_fn)
    for step in range(STEPS):
        for piece, gradient in zip(shards.pieces, gradients(step), strict=True):
            piece.parameter.grad = as_placed(gradient, piece.parameter)
        shards.take_gradients()
        optimizer.step()
    parameters, buffers = by_torch(adjust_lr_fn)
    for piece, parameter, buffer in zip(shards.pieces, parameters, buffers, strict=True):
        held: Any = piece.parameter
        sharded: Any = piece.as_shard(optimizer.state[piece.local]["momentum_buffer"])
        whole = [t.full_tensor() if isinstance(t, DTensor) else t for t in (held.detach(), sharded)]
        torch.testing.assert_close(whole[0], parameter, **CLOSE)
        assert torch.equal(whole[1], buffer), piece.name
        assert optimizer.state[piece.local]["momentum_buffer"].shape == piece.local.shape


@pytest.mark.parametrize("adjust_lr_fn", ["original", "match_rms_adamw"])
def test_on_one_rank_it_is_torchs(adjust_lr_fn: str) -> None:
    train(matrices(), adjust_lr_fn)


def count_sent() -> torch.Tensor:
    """Counts from now on the values that this rank hands to the exchanges, to itself too."""
    sent, exchange = torch.zeros((), dtype=torch.int64), muon._exchange

    def counted(parts: list[torch.Tensor], *others: Any) -> torch.Tensor:
        sent.add_(sum(part.numel() for part in parts))
        assert {part.dtype for part in parts} == {torch.bfloat16}
        return exchange(parts, *others)

    muon._exchange = counted
    return sent


def sharded(replicate: int, bucket: int) -> int:
    world = join_world()
    muon.BUCKET_VALUES = bucket
    model = matrices()
    fully_shard(model, mesh=data_mesh(resolve_layout(ParallelConfig(replicate, -1), world.size), "cpu"))
    sent = count_sent()
    train(model, "match_rms_adamw")
    dist.all_reduce(sent)
    values = sum(math.prod(shape) for shape in SHAPES)
    assert sent.item() == replicate * STEPS * 2 * values, "each value to its owner and back, in each replica"
    dist.destroy_process_group()
    return 0


def test_sharded_over_ranks_it_is_torchs_on_the_whole_matrices() -> None:
    for size, replicate, bucket in [(2, 1, 1), (4, 1, 1 << 24), (4, 2, 30), (3, 1, 10)]:
        assert Ranks(size, sharded, replicate, bucket).codes() == [0] * size, (size, replicate, bucket)


class Pair(nn.Module):
    """Two matrices, of which tensor parallelism cuts one by rows and one by columns."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 10, bias=False)
        self.second = nn.Linear(10, 6, bias=False)


@pytest.mark.filterwarnings("ignore")
def tensor_parallel() -> int:
    join_world()
    global SHAPES
    SHAPES = [(10, 6), (6, 10)]
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    model = Pair()
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), matrices(), strict=True):
            parameter.copy_(value)
    parallelize_module(model, mesh["tp"], {"first": ColwiseParallel(), "second": RowwiseParallel()})
    fully_shard(model, mesh=mesh["dp"])
    train(model, "original")
    dist.destroy_process_group()
    return 0


def test_cut_by_tensor_parallelism_and_sharded_it_is_torchs() -> None:
    assert Ranks(4, tensor_parallel).codes() == [0] * 4


def test_where_a_gradient_is_not_finite_nothing_moves_on_the_device() -> None:
    model = matrices()
    shards = Shards(model)
    group = {"params": [p.local for p in shards.pieces], "lr": RATE, "weight_decay": DECAY}
    optimizer = Muon([group], shards.pieces, momentum=MOMENTUM, adjust_lr_fn="original")
    for step in range(3):
        for piece, gradient in zip(shards.pieces, gradients(step), strict=True):
            piece.local.grad = gradient
        bad = step == 1
        if bad:
            for piece in shards.pieces:
                assert piece.local.grad is not None
                piece.local.grad[0, 0] = math.nan
        before = [p.detach().clone() for p in model]
        buffers = [
            optimizer.state[p.local].get("momentum_buffer", torch.zeros(())).clone() for p in shards.pieces
        ]
        optimizer.found_inf = torch.tensor(float(bad))
        optimizer.step()
        after = [optimizer.state[p.local]["momentum_buffer"] for p in shards.pieces]
        assert all(torch.equal(p, old) == bad for p, old in zip(model, before, strict=True))
        assert all(torch.equal(b, old) == bad for b, old in zip(after, buffers, strict=True))


def test_work_is_spread_evenly_over_the_ranks_of_a_bucket() -> None:
    wide = [(4096, 4096)] * 4 + [(11008, 4096)] * 3
    narrow = [(1024, 1024)] * 4 + [(2816, 1024)] * 2 + [(1024, 2816)]
    for shapes, world, waste in [(narrow * 24, 8, 1.1), (wide * 32, 8, 1.1), (wide * 32, 32, 1.1)]:
        buckets = split_evenly(shapes, world)
        assert sorted(i for bucket in buckets for i in bucket) == list(range(len(shapes)))
        assert len(buckets) > 1
        waited = 0
        for bucket in buckets:
            owners = owners_of([shapes[i] for i in bucket], world)
            loads = [0] * world
            for i, owner in zip(bucket, owners, strict=True):
                loads[owner] += newton_schulz_flops(shapes[i])
            waited += max(loads)
            values = [math.prod(shapes[i]) for i in bucket]
            assert sum(values) < world * (muon.BUCKET_VALUES + max(values)), "memory is bounded"
        assert waited * world < waste * sum(map(newton_schulz_flops, shapes))
