"""What tensor ranks tell each other within a forward and a backward pass.

Between blocks each rank holds its part of the sequence; inside, the whole sequence and its part of the
heads or channels (Korthikanti et al., arXiv 2205.05198).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


class Exchange:
    """The tensor ranks, as one of them sees them. Every rank of the mesh makes the same calls in the same
    order."""

    mesh: DeviceMesh | None

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh = mesh
        self.group = mesh.get_group()
        self.size = mesh.size()
        self.rank = mesh.get_local_rank()

    def whole(self, part: Tensor, dim: int = 1) -> Tensor:
        """All ranks' parts, joined along `dim`; backward, the sums of their gradients, each rank's part."""
        return cast("Tensor", _Whole.apply(part, self.group, dim))

    def parts(self, partial: Tensor, dim: int = 1) -> Tensor:
        """This rank's part along `dim` of the sum of all ranks' tensors; backward, the whole gradient.

        Raises ValueError where `dim` does not divide.
        """
        return cast("Tensor", _Parts.apply(partial, self.group, dim))

    def total(self, partial: Tensor) -> Tensor:
        """The sum of all ranks' tensors, of which each goes on with its own; backward, the sum as well."""
        return cast("Tensor", _Total.apply(partial, self.group))

    def sums(self, partial: Tensor) -> Tensor:
        """The sum of all ranks' tensors, without a gradient."""
        return summed(partial, self.group)

    def maxima(self, own: Tensor) -> Tensor:
        """The largest of all ranks' numbers, place by place, without a gradient."""
        out = own.clone()
        dist.all_reduce(out, dist.ReduceOp.MAX, group=self.group)
        return out

    def mine(self, whole: Tensor, dim: int = 1) -> Tensor:
        """This rank's part along `dim` of what every rank has."""
        length = whole.shape[dim] // self.size
        return whole.narrow(dim, length * self.rank, length)


class Alone(Exchange):
    """Stands for the exchange of the first of `size` ranks where there are no others: tensors get their
    shapes, not their values, which is all that preparing kernels needs."""

    def __init__(self, size: int) -> None:
        self.mesh, self.size, self.rank = None, size, 0

    def whole(self, part: Tensor, dim: int = 1) -> Tensor:
        return torch.cat([part] * self.size, dim)

    def parts(self, partial: Tensor, dim: int = 1) -> Tensor:
        return self.mine(partial, dim)

    def total(self, partial: Tensor) -> Tensor:
        return partial

    def sums(self, partial: Tensor) -> Tensor:
        return partial

    def maxima(self, own: Tensor) -> Tensor:
        return own


F = TypeVar("F", bound=Callable[..., Tensor])

# torch 2.13 warns at the old names, 2.11 has no others
_torch: Any = dist
_new = hasattr(dist, "all_gather_single")
_all_gather = _torch.all_gather_single if _new else _torch.all_gather_into_tensor
_reduce_scatter = _torch.reduce_scatter_single if _new else _torch.reduce_scatter_tensor


def _eager(function: F) -> F:
    """torch.compile breaks its graph around a collective, which stays what it is."""
    any_torch: Any = torch
    return any_torch._disable_dynamo(
        function
    )  # torch.compiler.disable would import dynamo and Triton at once


@_eager
def join(part: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    """All ranks' equal parts, in the order of ranks, joined along `dim`."""
    size = dist.get_world_size(group)
    out = part.new_empty((size * part.shape[0], *part.shape[1:]))
    _all_gather(out, part.contiguous(), group=group)
    return out if dim == 0 else out.unflatten(0, (size, -1)).movedim(0, dim).flatten(dim, dim + 1)


@_eager
def sum_parts(whole: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
    """This rank's part along `dim` of the sum of all ranks' tensors."""
    size = dist.get_world_size(group)
    if whole.shape[dim] % size:
        raise ValueError(f"{whole.shape[dim]} along dimension {dim} do not divide into {size} parts")
    ordered = whole.unflatten(dim, (size, -1)).movedim(dim, 0).contiguous()
    out = torch.empty_like(ordered[0])
    _reduce_scatter(out, ordered.flatten(0, 1), group=group)
    return out


@_eager
def summed(partial: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of all ranks' tensors, a new one."""
    out = partial.clone()
    dist.all_reduce(out, group=group)
    return out


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return join(part, group, dim)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return sum_parts(gradients[0], ctx.group, ctx.dim), None, None


class _Parts(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, group: dist.ProcessGroup, dim: int) -> Tensor:
        ctx.group, ctx.dim = group, dim
        return sum_parts(partial, group, dim)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return join(gradients[0], ctx.group, ctx.dim), None, None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, partial: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return summed(partial, group)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return summed(gradients[0], ctx.group), None
