"""One optimizer step: micro-batches forward and backward, one norm, one update."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from flame.batch import Batch
from flame.train.loss import LossModule
from flame.train.shards import Shards, clip


@dataclass(frozen=True, slots=True)
class StepResult:
    """What a step leaves on the device; reading it waits for the step to finish."""

    loss_sum: torch.Tensor  # float64 scalar: this rank's part of the cross-entropy over predicted tokens
    grad_norm: torch.Tensor  # float32 scalar: of the whole model's gradient, before clipping
    penalty_sum: torch.Tensor | None = (
        None  # float64 scalar: the z-loss over the same tokens, where there is one
    )


class Passes(Protocol):
    """Another way through a step's micro-batches than one after the other: a pipeline."""

    def run(self, batches: list[Batch], *, predicted: int, seed: tuple[int, ...]) -> torch.Tensor:
        """Forward and backward of all, gradients added up and reduced; this rank's part of the loss's sum."""
        ...

    def take_penalty(self) -> torch.Tensor | None:
        """As `LossModule.take_penalty`."""
        ...


def train_step(
    model: nn.Module | Passes,
    shards: Shards,
    optimizer: torch.optim.Optimizer,
    micro_batches: Iterable[Batch],
    *,
    predicted: int,
    clip_norm: float,
    seed: tuple[int, ...],
) -> StepResult:
    """Trains one step in place. `shards` are the model's, and the optimizer's parameters.

    `predicted` counts the step's predicted tokens over all ranks; `seed` is (run seed, step), and where
    ranks share a row (run seed, step, pipeline stage, context rank). A gradient that is not finite leaves
    the parameters and the optimizer's state untouched.
    """
    batches = list(micro_batches)

    # forward and backward: gradients add up, and are reduced over the ranks (`Shards.begin`)
    if isinstance(model, nn.Module):
        loss_sum = one_by_one(model, shards, batches, predicted, seed)
    else:
        loss_sum = model.run(batches, predicted=predicted, seed=seed)

    # one norm on every rank, which clips, is logged, and tells whether the update may happen
    gradients = shards.take_gradients()
    norm = shards.gradient_norm()
    if clip_norm > 0:
        clip(gradients, norm, clip_norm)
    update(optimizer, norm)
    shards.updated()
    shards.drop_gradients()
    if isinstance(model, LossModule) or not isinstance(model, nn.Module):
        penalty = model.take_penalty()
    else:
        penalty = None
    return StepResult(loss_sum, norm, penalty)


def one_by_one(
    model: nn.Module, shards: Shards, batches: list[Batch], predicted: int, seed: tuple[int, ...]
) -> torch.Tensor:
    """Each micro-batch forward and back; the sum of their losses, float64."""
    losses: list[torch.Tensor] = []
    for number, batch in enumerate(batches):
        shards.begin(model, last=number == len(batches) - 1)
        seed_generators(*seed, batch.first_row)
        loss: torch.Tensor = model(batch)
        (loss / max(1, predicted)).backward()
        shards.collect()
        losses.append(loss.detach())
    return torch.stack(losses).double().sum()


def seed_generators(*numbers: int) -> None:
    """Seeds torch's generators for one micro-batch, so that there is no random state to save."""
    digest = hashlib.blake2b("/".join(map(str, numbers)).encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)


def update(optimizer: torch.optim.Optimizer, norm: torch.Tensor) -> None:
    """Steps the optimizer unless `norm` is not finite. On a GPU the optimizer itself decides, on the device,
    so that the host need not wait: torch's fused ones, Muon here and the average of the weights all do."""
    if norm.is_cuda:
        optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]
        optimizer.grad_scale = None  # type: ignore[attr-defined]
        optimizer.step()
    elif bool(norm.isfinite()):
        optimizer.step()
