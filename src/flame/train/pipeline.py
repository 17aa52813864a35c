"""A step's micro-batches through the stages of a pipeline, by the schedules of torch.distributed.pipelining.

Every rank of a pipeline reads the same rows, so a stage takes tokens, positions, `cu_seqlens` and labels from
its own micro-batches; only hidden states, and what the model's blocks read beside them, travel.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import get_schedule_class

from flame.batch import Batch
from flame.models.family import Family
from flame.parallel.pipeline import Part, Stages
from flame.train.loss import LossModule, Reading
from flame.train.step import seed_generators

META = torch.device("meta")


class StageModule(LossModule):
    """One stage of a guest model, with the loss on the last one."""

    def __init__(
        self,
        part: Part,
        family: Family,
        compute: torch.dtype,
        z_loss: float = 0.0,
        *,
        backward_twice: bool,
    ) -> None:
        """`backward_twice`: the schedule takes inputs' and weights' gradients one after the other."""
        head = family.head(part.model) if part.last else None
        super().__init__(part.model, family.hidden, head, z_loss, backward_twice=backward_twice)
        self.part = part
        self._compute = compute
        self._turn = 0
        self._batches: list[Batch] = []
        self._seed: tuple[int, ...] = ()
        self.losses: list[Tensor] = []

    def begin(self, batches: list[Batch], seed: tuple[int, ...]) -> None:
        """Before a step. Every schedule takes the micro-batches in their order through a stage's forward."""
        self._batches, self._seed, self._turn, self.losses = batches, seed, 0, []

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, *received: Tensor, turn: Tensor | None = None, held_out: Batch | None = None
    ) -> Any:
        """The next micro-batch. What goes to the next stage, states [b, L, d] first; on the last one the
        sum of cross-entropy, a float32 scalar. `turn`, which is not read, is there because FSDP2 on GPUs
        cannot call a module without arguments, as the first stage would be.

        `held_out`: this one instead, outside of a step; of it the last stage has each token's cross-entropy.
        """
        if held_out is not None:
            return self._pass(received, held_out, self.token_losses)
        batch = self._batches[self._turn]
        self._turn += 1
        seed_generators(*self._seed, batch.first_row)
        for tensor in received:
            tensor.register_hook(torch.Tensor.contiguous)  # its gradient is sent
        made = self._pass(received, batch)
        if self.part.last:
            self.losses.append(made.detach().clone())
        return made

    def _pass(self, received: Sequence[Tensor], batch: Batch, read: Reading | None = None) -> Any:
        self.part.enter(received)
        if self.part.last:
            return super().forward(batch, read)
        self.states(batch)
        return self.part.leave(self._compute, batch.tokens.shape[0])


class Stage(PipelineStage):
    """torch's stage, which takes memory to receive into when a micro-batch comes, and gives it back: torch's
    own holds as much for every micro-batch of a step from the first step on."""

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        """Without greetings from a rank to itself, where its stages follow each other: gloo refuses them."""
        here = dist.get_rank()
        return [greeting for greeting in super()._get_init_p2p_neighbors_ops() if greeting.peer != here]

    def _prepare_forward_infra(self, *args: Any, **kwargs: Any) -> Any:
        with self._on_meta():
            return super()._prepare_forward_infra(*args, **kwargs)

    def _prepare_backward_infra(self, *args: Any, **kwargs: Any) -> Any:
        with self._on_meta():
            return super()._prepare_backward_infra(*args, **kwargs)

    @contextmanager
    def _on_meta(self) -> Generator[None]:
        """Within, what torch allocates has shapes and no memory."""
        device, self.device = self.device, META
        try:
            yield
        finally:
            self.device = device

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> Any:
        _move(self.args_recv_info[fwd_chunk_id], self.device)
        return super().get_fwd_recv_ops(fwd_chunk_id)

    def forward_one_chunk(self, fwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        output = super().forward_one_chunk(fwd_chunk_id, *args, **kwargs)
        _move(self.args_recv_info[fwd_chunk_id], META)  # the backward pass has its own hold on the states
        return output

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> Any:
        if not self.is_last:
            _move(self.grad_recv_info[bwd_chunk_id], self.device)
        return super().get_bwd_recv_ops(bwd_chunk_id)

    def backward_one_chunk(self, bwd_chunk_id: int, *args: Any, **kwargs: Any) -> Any:
        result: Any = super().backward_one_chunk(bwd_chunk_id, *args, **kwargs)
        if not self.is_last:
            _move(self.grad_recv_info[bwd_chunk_id], META)
        return result

    @staticmethod
    def is_root(info: Any) -> bool:
        """Whether it is an argument of the first stage, which is not received."""
        return getattr(info, "is_root_arg", False) or not hasattr(info, "buffer")


def _move(expected: Sequence[Any], device: torch.device) -> None:
    """Fresh room on `device` for what is to be received: to take memory, or, on meta, to give it back."""
    for info in expected:
        if not Stage.is_root(info):
            fresh = torch.empty_like(info.buffer, device=device)
            info.buffer = fresh.requires_grad_(info.buffer.requires_grad)


class Pipeline:
    """This rank's stages and the schedule that runs them: `train.step.Passes`."""

    def __init__(
        self,
        modules: Sequence[StageModule],
        stages: Stages,
        group: dist.ProcessGroup,
        device: torch.device,
        compute: torch.dtype,
    ) -> None:
        """`group`: the ranks of this pipeline."""
        self.modules = modules
        self.stages = stages
        self.group = group
        self.device = device
        self.compute = compute
        self._divisor = 1
        self._made: tuple[tuple[int, ...], Any] | None = None  # the schedule of the last shapes

    def run(self, batches: list[Batch], *, predicted: int, seed: tuple[int, ...]) -> Tensor:
        """Forward and backward of a step's micro-batches, which all have one shape; gradients are reduced
        over the ranks of each stage after the last. The loss's sum, float64: zero but on the last stage."""
        self._divisor = max(1, predicted)
        for place, module in enumerate(self.modules):
            module.begin(batches, (*seed, place) if place else seed)
        count = len(batches)
        schedule = self._schedule(count, tuple(batches[0].tokens.shape))
        schedule.step(turn=torch.arange(count), target=torch.zeros(count), return_outputs=False)
        losses = [loss for module in self.modules for loss in module.losses]
        if not losses:
            return torch.zeros((), dtype=torch.float64, device=self.device)
        return torch.stack(losses).double().sum()

    def take_penalty(self) -> Tensor | None:
        """As `LossModule.take_penalty`; zero on stages that have no loss."""
        taken = [penalty for module in self.modules if (penalty := module.take_penalty()) is not None]
        if taken:
            return torch.stack(taken).sum()
        if not self.modules[0].z_loss:
            return None
        return torch.zeros((), dtype=torch.float64, device=self.device)

    def _loss(self, loss: Tensor, _: Tensor) -> Tensor:
        return loss / self._divisor

    def _schedule(self, count: int, shape: tuple[int, ...]) -> Any:
        """Made anew when a step has other shapes, which torch's schedules are made for."""
        if self._made is None or self._made[0] != (count, *shape):
            stages = [self._stage(module, *shape) for module in self.modules]
            name = self.stages.order.torch_name
            if name == "1F1B" and count < self.stages.count:
                name = "GPipe"  # the same order, which torch's 1F1B refuses to be
            kind: Any = get_schedule_class(name)
            several = name not in ("GPipe", "1F1B")
            schedule = kind(stages if several else stages[0], count, loss_fn=self._loss, scale_grads=False)
            self._made = ((count, *shape), schedule)
        return self._made[1]

    def _stage(self, module: StageModule, rows: int, length: int) -> Stage:
        """With its shapes given, so that torch infers none by a trial run."""
        part = module.part
        travelling = tuple(
            torch.empty(shape, dtype=self.compute, device="meta", requires_grad=True)
            for shape in part.shapes(rows, length)
        )
        loss = torch.empty((), device="meta", requires_grad=True)
        return Stage(
            module,
            part.stage,
            part.stages,
            self.device,
            input_args=() if part.first else travelling,
            output_args=cast("Any", loss) if part.last else travelling,
            group=self.group,
        )
