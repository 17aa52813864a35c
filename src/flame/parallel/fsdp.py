"""Fully sharded data parallelism (FSDP2), and its replicated form (HSDP).

Reductions are plain sums: each micro-batch's loss is divided by the step's global count of predicted
tokens beforehand, so that uneven ranks weigh their tokens equally.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def shard(
    root: nn.Module,
    blocks: Iterable[nn.Module],
    mesh: DeviceMesh,
    compute: torch.dtype,
    *,
    keep_gathered: bool = False,
) -> FSDPModule:
    """Shards `root` in place, one group of parameters a block and one for the rest.

    `keep_gathered`: blocks gathered for a forward pass stay whole until the backward passes are done.

    Parameters and their gradients stay float32; forward and backward run in `compute`. Reductions run
    in float32 on GPUs. On CPUs they run in float64, whose sums round to the same float32 in any order:
    any number of processes then trains the same model, nearly always bit for bit.
    """
    reduce = torch.float64 if mesh.device_type == "cpu" else torch.float32
    policy = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=reduce)
    units = [*blocks, root]
    for unit in units:
        fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=False if keep_gathered else None)
    for unit in units:
        assert isinstance(unit, FSDPModule)
        unit.set_gradient_divide_factor(1.0)
        if mesh.device_type == "cpu":  # gloo knows no PREMUL_SUM
            unit.set_force_sum_reduction_for_comms(True)
    assert isinstance(root, FSDPModule)
    return root


def before_micro_batch(root: FSDPModule, *, last: bool, reduce_each: bool, gather_once: bool) -> None:
    """Says what becomes of gradients and gathered parameters in the micro-batch to come, the step's last one
    or not.

    `reduce_each`: gradients are reduced at once and added to this rank's shards. Copies of the model are
    summed with the last one all the same: the sums of a shard are as small before as after.
    `gather_once`: parameters stay gathered until the last one's backward pass.
    """
    root.set_requires_gradient_sync(last or reduce_each)
    root.set_requires_all_reduce(last)
    root.set_reshard_after_backward(last or not gather_once)


def reshard(root: nn.Module) -> None:
    """Frees what forward passes without a backward pass left gathered: FSDP2 keeps the root's parameters."""
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def gather_root(root: nn.Module) -> None:
    """Gathers the parameters that belong to no block, so that a forward pass may begin inside of `root`; the
    blocks gather their own. `reshard` ends it."""
    if isinstance(root, FSDPModule):
        root.unshard()


def settle(root: nn.Module) -> None:
    """Lets FSDP2 do now what it would do at the first forward pass of a model that was built on meta:
    move uneven shards to padded memory. After this the shards stay where they are."""
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.unshard()
            module.reshard()
