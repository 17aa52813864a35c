"""Held out micro-batches through the stages of a pipeline: forward passes alone, by a timetable of their own.

torch's schedules are made for steps of so many micro-batches, and some refuse certain numbers of them; a
validation set has as many as it has.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flame.batch import Batch, HeldOutBatch

if TYPE_CHECKING:  # torch's schedules bring Triton, which what ranks are forked from must not import
    from flame.train.pipeline import Pipeline


@dataclass(slots=True)
class _Passing:
    """A micro-batch on its way."""

    part: HeldOutBatch
    batch: Batch  # its batch, on the device
    stage: int = 0  # where it is now
    states: tuple[Tensor, ...] = ()  # for that stage, then from it; none where other ranks have them


class ForwardOnly(nn.Module):
    """This rank's stages, for passes without a way back. Nothing of the training pipeline is used or changed
    but its modules."""

    def __init__(self, pipeline: Pipeline) -> None:
        super().__init__()
        self.modules_here = nn.ModuleList(pipeline.modules)
        self._module_of = {module.part.stage: module for module in pipeline.modules}
        self._stages, self._compute = pipeline.stages, pipeline.compute
        self._group, self._device = pipeline.group, pipeline.device
        self._rank = dist.get_rank(pipeline.group)

    def token_losses(self, parts: Iterator[HeldOutBatch]) -> Iterator[tuple[HeldOutBatch, Tensor]]:
        """Each micro-batch with the cross-entropy of its labels, float32 [n], 0 where masked: on the rank
        that has the last stage; others, which have to go through it as well, get none.

        In each tick a rank runs one stage at most, then all hand on together what they have made: ranks of a
        pair meet their sends and receives in one order, which NCCL needs.
        """
        # NCCL: all ranks of a group have to be in its first operation, which batches of p2p are not
        dist.all_reduce(torch.zeros((), device=self._device), group=self._group)
        passing: list[_Passing] = []
        begun = tick = 0
        while True:
            if tick == self._stages.begins(begun) and (part := next(parts, None)) is not None:
                passing.append(_Passing(part, part.batch.to(self._device)))
                begun += 1
            if not passing:
                return
            for one in passing:
                if (module := self._module_of.get(one.stage)) is not None:
                    made = module(*one.states, held_out=one.batch)
                    if module.part.last:
                        yield one.part, made
                    else:
                        one.states = made
            passing = [one for one in passing if one.stage + 1 < self._stages.count]
            self._hand_on(passing)
            tick += 1

    def _hand_on(self, passing: Sequence[_Passing]) -> None:
        """Each micro-batch to its next stage."""
        operations: list[dist.P2POp] = []
        for one in passing:
            here, there = self._stages.rank_of(one.stage), self._stages.rank_of(one.stage + 1)
            one.stage += 1
            if here == there:
                continue
            if self._rank == here:
                operations += [self._operation(dist.isend, states, there) for states in one.states]
                one.states = ()
            elif self._rank == there:
                one.states = self._room_for(one)
                operations += [self._operation(dist.irecv, states, here) for states in one.states]
        for work in dist.batch_isend_irecv(operations) if operations else ():
            work.wait()

    def _room_for(self, one: _Passing) -> tuple[Tensor, ...]:
        rows, length = one.batch.tokens.shape
        shapes = self._module_of[one.stage].part.shapes(rows, length)
        return tuple(torch.empty(shape, dtype=self._compute, device=self._device) for shape in shapes)

    def _operation(self, way: Any, states: Tensor, peer: int) -> dist.P2POp:
        return dist.P2POp(way, states, group=self._group, group_peer=peer)
