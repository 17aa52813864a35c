"""Muon on sharded matrices: each is orthogonalised whole, on one of the ranks that share it.

Momentum and parameters stay sharded. What is orthogonalised, the momentum in bfloat16, travels to the
matrix's owner and the result back: two exchanges of a rank's own shards, whatever the number of ranks.
docs/decisions/0010-muon-on-shards.md has the bytes and operations, and what else was possible.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.optim import _muon as torch_muon

from flame.train.shards import Piece

# what torch.optim.Muon does with one whole matrix, and its defaults
_orthogonal: Callable[..., Tensor] = torch_muon._zeropower_via_newtonschulz  # pyright: ignore[reportPrivateUsage]
_adjusted: Callable[..., float] = torch_muon._adjust_lr  # pyright: ignore[reportPrivateUsage]
_COEFFICIENTS = (torch_muon.DEFAULT_A, torch_muon.DEFAULT_B, torch_muon.DEFAULT_C)

BUCKET_VALUES = 1 << 24  # of the matrices that a rank owns, exchanged at a time: 32 MiB each way


class Muon(torch.optim.Optimizer):
    """torch.optim.Muon, with Nesterov's step, for parameters whose shards lie on many ranks.

    All ranks call `step` together. The state of a parameter is `momentum_buffer`, float32, a shard like it.
    `found_inf`: see `optimizer.Optimizers`.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        pieces: Iterable[Piece],
        *,
        momentum: float,
        adjust_lr_fn: str,
    ) -> None:
        """`groups` of local parameters, each one of `pieces`, which know how they lie on the ranks."""
        super().__init__(groups, {})
        self.found_inf: Tensor | None = None
        self._momentum = momentum
        self._adjust_lr_fn = adjust_lr_fn
        self._pieces = {id(piece.local): piece for piece in pieces}
        self._planned: list[int] = []
        self._buckets: list[Bucket] = []

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Updates all parameters that have gradients."""
        held = [(g, p) for g in self.param_groups for p in g["params"] if p.grad is not None]
        planned = [id(p) for _, p in held]
        if planned != self._planned:
            self._planned = planned
            self._buckets = plan([self._pieces[i] for i in planned])
        group_of = {id(p): group for group, p in held}
        for bucket in self._buckets:
            directions = [self._direction(piece.local) for piece in bucket.pieces]
            for piece, update in zip(bucket.pieces, bucket.orthogonalise(directions), strict=True):
                self._apply(piece, update, group_of[id(piece.local)])

    def _direction(self, parameter: Tensor) -> Tensor:
        """Moves the momentum; what is to be orthogonalised of it, bfloat16, as Newton and Schulz take it."""
        gradient = cast("Tensor", parameter.grad)
        weight: Any = 1 - self._momentum
        if self.found_inf is not None:
            gradient = gradient.masked_fill(self.found_inf > 0, 0.0)
            weight = (1 - self.found_inf) * weight
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer = state["momentum_buffer"]
        buffer.lerp_(gradient, weight)
        return gradient.lerp(buffer, self._momentum).bfloat16()

    def _apply(self, piece: Piece, update: Tensor, group: dict[str, Any]) -> None:
        rate: Any = group["lr"]
        decay: Any = rate * group["weight_decay"]
        step: Any = _adjusted(rate, self._adjust_lr_fn, piece.parameter.shape)
        if self.found_inf is not None:
            kept = 1 - self.found_inf
            decay, step = kept * decay, kept * step
        piece.local.mul_(1 - decay)
        piece.local.sub_(update.float() * step)


# --------------------------------------------------------------------------------- on the ranks


@dataclass(frozen=True)
class Bucket:
    """Matrices that are exchanged at a time. `group`: the ranks over which their rows lie; None where each
    rank has them whole, or where they lie so that only DTensor knows how."""

    pieces: list[Piece]
    owners: list[int]  # of each, its rank within the group
    group: dist.ProcessGroup | None

    def orthogonalise(self, shards: list[Tensor]) -> list[Tensor]:
        """This rank's shards of the orthogonalised matrices, from those of the matrices."""
        if self.group is None:
            return [_alone(piece, shard) for piece, shard in zip(self.pieces, shards, strict=True)]
        world, me = dist.get_world_size(self.group), dist.get_rank(self.group)
        shapes = [piece.parameter.shape for piece in self.pieces]
        rows = [[_rows(shape[0], rank, world) for rank in range(world)] for shape in shapes]
        mine = [i for i, owner in enumerate(self.owners) if owner == me]
        to_owners = [i for rank in range(world) for i, owner in enumerate(self.owners) if owner == rank]
        sent = [0] * world  # values, to each owner
        for i, owner in enumerate(self.owners):
            sent[owner] += shards[i].numel()
        lengths = [[rows[i][rank] * shapes[i][1] for i in mine] for rank in range(world)]
        received = [sum(of_rank) for of_rank in lengths]

        # the ranks' shards of my matrices come to me
        came = _exchange([shards[i] for i in to_owners], sent, received, self.group).split(received)
        parts = [values.split(of_rank) for values, of_rank in zip(came, lengths, strict=True)]
        whole = [torch.cat([part[k] for part in parts]).view(shapes[i]) for k, i in enumerate(mine)]
        cut = [_newton_schulz(matrix).split(rows[i]) for i, matrix in zip(mine, whole, strict=True)]
        nothing = [shards[0].new_empty(0)]  # who owns no matrix of this bucket has none to send

        # and go back orthogonalised
        outgoing = nothing + [matrix[rank] for rank in range(world) for matrix in cut]
        back = _exchange(outgoing, received, sent, self.group).split([shards[i].numel() for i in to_owners])
        done = {i: values.view(shards[i].shape) for i, values in zip(to_owners, back, strict=True)}
        return [done[i] for i in range(len(shards))]


def plan(pieces: Sequence[Piece]) -> list[Bucket]:
    """The matrices in buckets, in each of which every rank of a group owns about the same work."""
    buckets: list[Bucket] = []
    by_group: dict[dist.ProcessGroup | None, list[Piece]] = {}
    for piece in pieces:
        by_group.setdefault(_rows_group(piece), []).append(piece)
    for group, members in by_group.items():
        world = dist.get_world_size(group) if group is not None else 1
        shapes = [tuple(piece.parameter.shape) for piece in members]
        for part in split_evenly(shapes, world):
            owners = owners_of([shapes[i] for i in part], world)
            buckets.append(Bucket([members[i] for i in part], owners, group))
    return buckets


def split_evenly(shapes: Sequence[tuple[int, ...]], world: int) -> list[list[int]]:
    """The matrices, by number, in buckets: those of most work first, as many for each of `world` ranks, so
    that no rank waits long for another; about BUCKET_VALUES values for each rank, and at least one matrix."""
    buckets: list[list[int]] = []
    values = 0
    for i in sorted(range(len(shapes)), key=lambda i: -newton_schulz_flops(shapes[i])):
        if not buckets or (len(buckets[-1]) % world == 0 and values >= world * BUCKET_VALUES):
            buckets.append([])
            values = 0
        buckets[-1].append(i)
        values += math.prod(shapes[i])
    return buckets


def owners_of(shapes: Sequence[tuple[int, ...]], world: int) -> list[int]:
    """For each matrix the rank that orthogonalises it: the most work first, to whom has least so far."""
    loads = [0] * world
    owners = [0] * len(shapes)
    for i in sorted(range(len(shapes)), key=lambda i: -newton_schulz_flops(shapes[i])):
        owners[i] = min(range(world), key=loads.__getitem__)
        loads[owners[i]] += newton_schulz_flops(shapes[i])
    return owners


def newton_schulz_flops(shape: tuple[int, ...]) -> int:
    """Floating-point operations of orthogonalising one matrix: three products in each iteration."""
    short, long = sorted(shape)
    return torch_muon.DEFAULT_NS_STEPS * (4 * short * short * long + 2 * short**3)


def _newton_schulz(matrix: Tensor) -> Tensor:
    return _orthogonal(matrix, _COEFFICIENTS, torch_muon.DEFAULT_NS_STEPS, torch_muon.EPS)


def _alone(piece: Piece, shard: Tensor) -> Tensor:
    """Gathered whole on every rank, where it is not whole already; the way for any placement."""
    parameter = piece.parameter
    placed = piece.as_shard(shard)
    if not isinstance(placed, DTensor) or not isinstance(parameter, DTensor):
        return _newton_schulz(shard)
    whole = _newton_schulz(placed.full_tensor())
    everywhere = [Replicate()] * parameter.device_mesh.ndim
    spread = DTensor.from_local(whole, parameter.device_mesh, everywhere, run_check=False)
    return spread.redistribute(placements=parameter.placements).to_local()


def _rows_group(piece: Piece) -> dist.ProcessGroup | None:
    """The ranks over which the rows lie, cut in order, where they lie over one dimension of the mesh."""
    parameter = piece.parameter
    if not isinstance(parameter, DTensor):
        return None
    mesh = parameter.device_mesh
    spread = [d for d, p in enumerate(parameter.placements) if mesh.size(d) > 1 and not p.is_replicate()]
    if len(spread) != 1 or type(parameter.placements[spread[0]]) is not Shard:
        return None
    return mesh.get_group(spread[0]) if parameter.placements[spread[0]].is_shard(0) else None


def _rows(length: int, rank: int, world: int) -> int:
    """How many of `length` rows `rank` has: DTensor cuts in steps of length / world, rounded up."""
    step = -(-length // world)
    return max(0, min(step, length - rank * step))


def _exchange(parts: list[Tensor], sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    """What all ranks send me, in their order; `sent` and `received`: values for and from each rank."""
    outgoing = torch.cat([part.reshape(-1) for part in parts])
    incoming = outgoing.new_empty(sum(received))
    dist.all_to_all_single(incoming, outgoing, received, sent, group=group)
    return incoming
