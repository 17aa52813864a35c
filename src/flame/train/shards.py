"""A model's parameters as this rank holds them: plain tensors, one a parameter.

FSDP2 gives parameters and gradients as DTensors, whose every operation costs the host some ten
microseconds a tensor. What the optimizer does is local to a shard, so it works on the plain tensors
inside, found once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Shard


@dataclass(frozen=True, slots=True)
class Piece:
    """One parameter's part on this rank."""

    name: str  # fully qualified
    parameter: nn.Parameter  # as the model has it
    local: nn.Parameter  # plain; the same memory

    def gradient(self) -> torch.Tensor | None:
        """This rank's part of the gradient, plain; the same memory."""
        found = self.parameter.grad
        return found.to_local() if isinstance(found, DTensor) else found

    def as_shard(self, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor of the local shape as a shard of the whole, as the parameter is; others as they are."""
        parameter = self.parameter
        if not isinstance(parameter, DTensor) or tensor.shape != self.local.shape:
            return tensor
        return DTensor.from_local(
            tensor,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )


class Shards:
    """All parameters of a model whose memory stays where it is (see `parallel.fsdp.settle`)."""

    def __init__(self, model: nn.Module) -> None:
        self.pieces = [
            Piece(name, parameter, nn.Parameter(_plain(parameter), requires_grad=parameter.requires_grad))
            for name, parameter in model.named_parameters()
        ]
        self._alike: dict[tuple[dist.ProcessGroup, ...], list[Piece]] = {}
        for piece in self.pieces:
            self._alike.setdefault(_sharding_groups(piece.parameter), []).append(piece)

    @torch.no_grad()
    def take_gradients(self) -> list[torch.Tensor]:
        """Gives each local parameter its gradient; the gradients, plain."""
        gradients: list[torch.Tensor] = []
        for piece in self.pieces:
            assert _plain(piece.parameter).data_ptr() == piece.local.data_ptr(), f"{piece.name} has moved"
            piece.local.grad = gradient = piece.gradient()
            if gradient is not None:
                gradients.append(gradient)
        return gradients

    def drop_gradients(self) -> None:
        for piece in self.pieces:
            piece.parameter.grad = piece.local.grad = None

    def gradient_norm(self) -> torch.Tensor:
        """The 2-norm of all gradients taken, as one float32 scalar that is equal on every rank.

        Squares are summed over the mesh dimensions a parameter is sharded on; replicas count once. On
        CPUs the sums are float64, so that the shards' sizes do not show (see `parallel.fsdp.shard`).
        """
        device = self.pieces[0].local.device
        precision = torch.float32 if device.type == "cuda" else torch.float64
        total = torch.zeros((), dtype=precision, device=device)
        for groups, pieces in self._alike.items():
            gradients = [p.local.grad for p in pieces if p.local.grad is not None]
            if not gradients:
                continue  # the same ones on every rank of the groups
            norms = torch._foreach_norm(gradients, 2, dtype=precision)  # pyright: ignore[reportPrivateUsage]
            squares = torch.stack(norms).square().sum()
            for group in groups:
                dist.all_reduce(squares, group=group)
            total += squares
        return total.sqrt().float()


def clip(gradients: list[torch.Tensor], norm: torch.Tensor, limit: float) -> None:
    """Scales gradients whose norm exceeds `limit` down to it, without waiting for the device."""
    scale = (limit / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(gradients, scale)  # pyright: ignore[reportPrivateUsage]


def _plain(parameter: nn.Parameter) -> torch.Tensor:
    tensor = parameter.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _sharding_groups(parameter: nn.Parameter) -> tuple[dist.ProcessGroup, ...]:
    """The groups over which the parameter's parts lie."""
    if not isinstance(parameter, DTensor):
        return ()
    sharded = [d for d, placement in enumerate(parameter.placements) if isinstance(placement, Shard)]
    return tuple(parameter.device_mesh.get_group(d) for d in sharded)
