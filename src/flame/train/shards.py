"""A model's parameters as this rank holds them: plain tensors, one a parameter.

FSDP2 gives parameters and gradients as DTensors, whose every operation costs the host some ten
microseconds a tensor. What the optimizer does is local to a shard, so it works on the plain tensors
inside, found once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from flame.parallel.fsdp import before_micro_batch

TENSOR = "tp"  # torchtitan's name of the mesh dimension


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

    def master(self) -> torch.Tensor:
        """The float32 values that the optimizer works on, as a checkpoint holds them."""
        return self.as_shard(self.local.detach())

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
    """All parameters of a model that FSDP2 shards; its memory stays where it is (`parallel.fsdp.settle`)."""

    def __init__(
        self,
        model: nn.Module,
        pipeline: dist.ProcessGroup | None = None,
        *,
        reduce_each: bool = False,
        gather_once: bool = False,
    ) -> None:
        """`pipeline`: the ranks that hold the model's other blocks. `reduce_each`: gradients are reduced
        after every micro-batch; `gather_once`: parameters are gathered once a step."""
        self._pipeline = pipeline
        self._reduce_each = reduce_each
        self._gather_once = gather_once
        self.pieces = [
            Piece(name, parameter, nn.Parameter(_plain(parameter), requires_grad=parameter.requires_grad))
            for name, parameter in model.named_parameters()
        ]
        self._replicas: dict[dist.ProcessGroup, list[Piece]] = {}  # over tensor ranks
        for piece in self.pieces:
            group = _tensor_group(piece.parameter)
            if group is not None:
                self._replicas.setdefault(group, []).append(piece)
        self._alike: dict[tuple[dist.ProcessGroup, ...], list[Piece]] = {}
        for piece in self.pieces:
            self._alike.setdefault(_sharding_groups(piece.parameter), []).append(piece)

    def begin(self, root: nn.Module, *, last: bool) -> None:
        """Before a micro-batch: gradients are reduced over the ranks with the last one, or with each."""
        before_micro_batch(
            cast("FSDPModule", root),
            last=last,
            reduce_each=self._reduce_each,
            gather_once=self._gather_once,
        )

    def collect(self) -> None:
        """After a micro-batch's backward pass. FSDP2 adds gradients up by itself."""

    def updated(self) -> None:
        """After the optimizer's step. Here the model computes with the optimizer's own memory."""

    @torch.no_grad()
    def take_gradients(self) -> list[torch.Tensor]:
        """Gives each local parameter its gradient; the gradients, plain."""
        gradients: list[torch.Tensor] = []
        for piece in self.pieces:
            assert _plain(piece.parameter).data_ptr() == piece.local.data_ptr(), f"{piece.name} has moved"
            piece.local.grad = gradient = piece.gradient()
            if gradient is not None:
                gradients.append(gradient)
        self._sum_replicas()
        return gradients

    def _sum_replicas(self) -> None:
        """What all tensor ranks have, each has used for its part of the work: gradients become their sums."""
        for group, pieces in self._replicas.items():
            gradients = [p.local.grad for p in pieces if p.local.grad is not None]
            if not gradients:
                continue  # the same ones on every rank of the group
            flat = torch.cat([g.flatten().to(_precision(g.device)) for g in gradients])
            dist.all_reduce(flat, group=group)
            for gradient, total in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(total.view_as(gradient))

    def drop_gradients(self) -> None:
        for piece in self.pieces:
            piece.parameter.grad = piece.local.grad = None

    def gradient_norm(self) -> torch.Tensor:
        """The 2-norm of all gradients taken, as one float32 scalar that is equal on every rank.

        Squares are summed over the mesh dimensions a parameter is sharded on, replicas counted once, then
        over the stages of a pipeline. On CPUs the sums are float64, so that the shards' sizes do not show
        (see `parallel.fsdp.shard`).
        """
        device = self.pieces[0].local.device
        precision = _precision(device)
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
        if self._pipeline is not None:
            dist.all_reduce(total, group=self._pipeline)
        return total.sqrt().float()


class WholeModel(Shards):
    """A model that lies on this rank alone: what FSDP2 does for many ranks, without its hooks.

    The optimizer's parameters are float32. The model computes with copies of them in `compute`, where
    that is another dtype. Gradients of micro-batches are summed in float32, on CPUs in float64.
    """

    def __init__(self, model: nn.Module, compute: torch.dtype) -> None:
        super().__init__(model)
        device = self.pieces[0].local.device
        self._precision = _precision(device)
        self._sums: dict[int, torch.Tensor] = {}  # by the piece's number
        self._copied = compute != torch.float32
        if self._copied:
            for piece in self.pieces:
                piece.parameter.data = piece.local.data.to(compute)

    def begin(self, root: nn.Module, *, last: bool) -> None:
        """Nothing to reduce."""

    @torch.no_grad()
    def collect(self) -> None:
        """Adds a micro-batch's gradients to the sums."""
        found = {i: p.parameter.grad for i, p in enumerate(self.pieces) if p.parameter.grad is not None}
        fresh = [torch.empty_like(gradient, dtype=self._precision) for gradient in found.values()]
        torch._foreach_copy_(fresh, list(found.values()))  # pyright: ignore[reportPrivateUsage]
        both = [(self._sums[i], new) for i, new in zip(found, fresh, strict=True) if i in self._sums]
        if both:
            sums, new = zip(*both, strict=True)
            torch._foreach_add_(list(sums), list(new))  # pyright: ignore[reportPrivateUsage]
        for i, new in zip(found, fresh, strict=True):
            self._sums.setdefault(i, new)
            self.pieces[i].parameter.grad = None

    def take_gradients(self) -> list[torch.Tensor]:
        """Gives each of the optimizer's parameters its gradient, float32; the gradients."""
        for i, total in self._sums.items():
            self.pieces[i].local.grad = total.float()
        self._sums.clear()
        return [piece.local.grad for piece in self.pieces if piece.local.grad is not None]

    @torch.no_grad()
    def updated(self) -> None:
        """The model computes with the new values."""
        if self._copied:
            copies = [piece.parameter.data for piece in self.pieces]
            masters = [piece.local.data for piece in self.pieces]
            torch._foreach_copy_(copies, masters)  # pyright: ignore[reportPrivateUsage]


def clip(gradients: list[torch.Tensor], norm: torch.Tensor, limit: float) -> None:
    """Scales gradients whose norm exceeds `limit` down to it, without waiting for the device."""
    scale = (limit / (norm + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(gradients, scale)  # pyright: ignore[reportPrivateUsage]


def _precision(device: torch.device) -> torch.dtype:
    """Of sums: on CPUs such that neither the number of ranks nor their order shows."""
    return torch.float32 if device.type == "cuda" else torch.float64


def _plain(parameter: nn.Parameter) -> torch.Tensor:
    tensor = parameter.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _sharding_groups(parameter: nn.Parameter) -> tuple[dist.ProcessGroup, ...]:
    """The groups over which the parameter's parts lie."""
    if not isinstance(parameter, DTensor):
        return ()
    sharded = [d for d, placement in enumerate(parameter.placements) if not placement.is_replicate()]
    return tuple(parameter.device_mesh.get_group(d) for d in sharded)


def _tensor_group(parameter: nn.Parameter) -> dist.ProcessGroup | None:
    """The tensor ranks, where each has all of the parameter (`parallel.tensor`)."""
    names = parameter.device_mesh.mesh_dim_names if isinstance(parameter, DTensor) else None
    if names is None or TENSOR not in names:
        return None
    assert isinstance(parameter, DTensor)
    dim = names.index(TENSOR)
    return parameter.device_mesh.get_group(dim) if parameter.placements[dim].is_replicate() else None
