"""One optimizer step: micro-batches forward and backward, one norm, one update."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Shard

from flame.batch import Batch


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step leaves on the device; reading it waits for the step to finish."""

    loss_sum: torch.Tensor  # float64 scalar: cross-entropy over this rank's predicted tokens
    grad_norm: torch.Tensor  # float32 scalar: of the whole model's gradient, before clipping


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    micro_batches: Iterable[Batch],
    *,
    predicted: int,
    clip_norm: float,
    seed: tuple[int, int],
) -> StepResult:
    """Trains one step in place. `predicted` counts the step's predicted tokens over all ranks;
    `seed` is (run seed, step). A gradient that is not finite leaves the parameters untouched."""
    batches = list(micro_batches)
    losses: list[torch.Tensor] = []

    # forward and backward: gradients add up, the last micro-batch reduces them over the ranks
    for number, batch in enumerate(batches):
        cast("FSDPModule", model).set_requires_gradient_sync(number == len(batches) - 1)
        seed_generators(*seed, batch.first_row)
        loss: torch.Tensor = model(batch)
        (loss / max(1, predicted)).backward()
        losses.append(loss.detach())

    # one norm on every rank, which clips, is logged, and tells whether the update may happen
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = gradient_norm(parameters)
    if clip_norm > 0:
        clip(parameters, norm, clip_norm)
    update(optimizer, norm)
    optimizer.zero_grad(set_to_none=True)
    return StepResult(torch.stack(losses).double().sum(), norm)


def seed_generators(seed: int, step: int, first_row: int) -> None:
    """Seeds torch's generators for one micro-batch, so that there is no random state to save."""
    digest = hashlib.blake2b(f"{seed}/{step}/{first_row}".encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)


def gradient_norm(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
    """The 2-norm of all gradients as one float32 scalar, equal on every rank.

    Squares are summed over the mesh dimensions a gradient is sharded on; replicas count once. On CPUs
    the sums are float64, so that the shards' sizes do not show (see `parallel.fsdp.shard`).
    """
    sums: dict[tuple[Any, ...], list[torch.Tensor]] = {}
    groups: dict[tuple[Any, ...], list[dist.ProcessGroup]] = {}
    for parameter in parameters:
        gradient = cast("torch.Tensor", parameter.grad)
        key: tuple[Any, ...] = ()
        if isinstance(gradient, DTensor):
            sharded = [d for d, p in enumerate(gradient.placements) if isinstance(p, Shard)]
            key = (gradient.device_mesh, *sharded)
            groups[key] = [gradient.device_mesh.get_group(d) for d in sharded]
            gradient = gradient.to_local()
        sums.setdefault(key, []).append(gradient)
    total: torch.Tensor | None = None
    for key, gradients in sums.items():
        precision = torch.float32 if gradients[0].is_cuda else torch.float64
        norms = torch._foreach_norm(gradients, 2, dtype=precision)  # pyright: ignore[reportPrivateUsage]
        squares = torch.stack(norms).square().sum()
        for group in groups.get(key, []):
            dist.all_reduce(squares, group=group)
        total = squares if total is None else total + squares
    assert total is not None, "no parameter has a gradient"
    return total.sqrt().float()


def clip(parameters: Iterable[nn.Parameter], norm: torch.Tensor, limit: float) -> None:
    """Scales gradients whose norm exceeds `limit` down to it, without waiting for the device."""
    scale = (limit / (norm + 1e-6)).clamp(max=1.0)
    gradients = [_local(cast("torch.Tensor", p.grad)) for p in parameters]
    torch._foreach_mul_(gradients, scale)  # pyright: ignore[reportPrivateUsage]


def update(optimizer: torch.optim.Optimizer, norm: torch.Tensor) -> None:
    """Steps the optimizer unless `norm` is not finite. On a GPU the fused kernel itself decides, so
    that the host need not wait."""
    if norm.is_cuda:
        optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
        optimizer.grad_scale = None  # type: ignore[attr-defined]
        optimizer.step()
    elif bool(norm.isfinite()):
        optimizer.step()


def _local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
