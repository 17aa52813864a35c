"""Pipeline parallelism: which blocks a stage has, and a model cut down to them.

A stage runs the whole model's own forward pass, with its masks and positions. Blocks of other stages only
pass their input on there; the embedding gives the states that came from the stage before; the final norm and
the head are the last stage's. What a stage lacks has no parameters, so none is ever allocated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import inf
from typing import Any, cast

import torch
from torch import Tensor, nn

from flame.errors import RecipeError
from flame.models.family import Carried, Family, StagePlan
from flame.models.flops import matrix_flops
from flame.parallel.config import ParallelConfig
from flame.parallel.mesh import Layout


@dataclass(frozen=True, slots=True)
class Order:
    """What a schedule asks for."""

    torch_name: str  # for `torch.distributed.pipelining.schedules.get_schedule_class`
    stages_per_rank: int  # where the recipe leaves them out
    fewest: int
    most: int | None
    splits_backward: bool = False  # the inputs' gradients first, the weights' later
    turns: bool = False  # stages go down the ranks and up again


ORDERS = {
    "gpipe": Order("GPipe", 1, 1, 1),
    "1f1b": Order("1F1B", 1, 1, 1),
    "interleaved": Order("Interleaved1F1B", 2, 2, None),
    "zero_bubble": Order("InterleavedZeroBubble", 1, 1, None, splits_backward=True),
    "zbv": Order("ZBVZeroBubble", 2, 2, 2, splits_backward=True, turns=True),
}


@dataclass(frozen=True, slots=True)
class Stages:
    """How many stages there are, and on which ranks of the pipeline."""

    schedule: str
    ranks: int
    per_rank: int

    @property
    def count(self) -> int:
        return self.ranks * self.per_rank

    @property
    def order(self) -> Order:
        return ORDERS[self.schedule]

    def of(self, rank: int) -> list[int]:
        """The stages of a rank of the pipeline, in order."""
        if self.order.turns:
            return [rank, self.count - 1 - rank]
        return list(range(rank, self.count, self.ranks))

    def rank_of(self, stage: int) -> int:
        """The rank of the pipeline that has a stage."""
        if self.order.turns and stage >= self.ranks:
            return self.count - 1 - stage
        return stage % self.ranks

    def begins(self, number: int) -> int:
        """When a micro-batch of a pass without a way back enters the first stage, if each is in the next
        stage a tick later: as early as it can be without any rank having two stages at work in one tick."""
        if self.order.turns:
            return self.per_rank * number  # a rank's two stages are an odd number of ticks apart
        rounds, place = divmod(number, self.ranks)
        return rounds * self.count + place


# ------------------------------------------------------------------------------------- refusals


def plan_stages(parallel: ParallelConfig, family: Family, config: Any, layout: Layout) -> Stages | None:
    """The stages of a layout, None where it has no pipeline. Raises RecipeError where a model of this
    config cannot be cut so; `family` has a plan (`parallel.support.check_layout`)."""
    if layout.pipeline == 1:
        return None
    order = ORDERS[parallel.pipeline_schedule]
    per_rank = parallel.pipeline_stages_per_rank
    per_rank = order.stages_per_rank if per_rank is None else per_rank
    if per_rank < order.fewest or (order.most is not None and per_rank > order.most):
        allowed = f"{order.fewest}" if order.most == order.fewest else f"at least {order.fewest}"
        raise RecipeError(
            f"parallel.pipeline_stages_per_rank: found {per_rank}, but the schedule "
            f"{parallel.pipeline_schedule} takes {allowed}"
        )
    if getattr(config, "tie_word_embeddings", False):
        raise RecipeError(
            f"parallel.pipeline: {layout.pipeline}, but the model's embedding and head share one matrix "
            '(tie_word_embeddings), which would lie on two stages; set "tie_word_embeddings": false in its '
            "config, or use parallel.shard"
        )
    stages = Stages(parallel.pipeline_schedule, layout.pipeline, per_rank)
    depth, split = int(config.num_hidden_layers), parallel.pipeline_split
    if depth < stages.count:
        raise RecipeError(
            f"parallel.pipeline: {layout.pipeline} ranks x {per_rank} stages are {stages.count} stages, but "
            f"the {family.name} model has {depth} blocks; use at most {depth} stages"
        )
    if split is not None and (len(split) != stages.count or sum(split) != depth or min(split) < 1):
        raise RecipeError(
            f"parallel.pipeline_split: found {split}, which is {sum(split)} blocks on {len(split)} stages; "
            f"expected {stages.count} numbers of at least 1 whose sum is the model's {depth} blocks"
        )
    return stages


def check_micro_batches(stages: Stages, micro_batches: Iterable[int]) -> str | None:
    """What to say of numbers of micro-batches a step on a rank. Raises RecipeError where a schedule cannot
    take them."""
    note: str | None = None
    for count in micro_batches:
        rounds = max(1, count // stages.ranks)
        if stages.order.turns and count < 2 * stages.ranks - 1:
            raise RecipeError(_unfit(stages, count, f"at least {2 * stages.ranks - 1}"))
        if stages.order.torch_name.startswith("Interleaved") and count % rounds:
            near = count // rounds * rounds
            raise RecipeError(_unfit(stages, count, f"a multiple of {rounds}, such as {near}"))
        if count < stages.count:
            note = (
                f"{count} micro-batches a step on {stages.count} pipeline stages: most stages wait most of "
                "the time; lower batch.micro_batch_rows or raise batch.tokens_per_step"
            )
    return note


def _unfit(stages: Stages, count: int, wanted: str) -> str:
    return (
        f"parallel.pipeline_schedule: {stages.schedule} on {stages.ranks} ranks takes {wanted} micro-batches "
        f"a step, but has {count}; change batch.micro_batch_rows or batch.tokens_per_step, or use 1f1b"
    )


# -------------------------------------------------------------------------------------- balance


def split_blocks(family: Family, model: nn.Module, stages: Stages, split: Sequence[int] | None) -> list[int]:
    """How many blocks each stage has. Without `split` the largest stage's cost is as small as it can be,
    where a cost is the sum of its shares of the model's FLOPs and of its parameters: the embedding's counts
    on the first stage, the head's on the last."""
    if split is not None:
        return list(split)
    blocks = [block for _, block in family.blocks(model)]
    head = family.head(model)
    products = [matrix_flops(block) for block in blocks]
    mixing = family.count(model).per_token - sum(products) - matrix_flops(head)  # about the same in each
    flops = [product + mixing / len(blocks) for product in products]
    sizes = [_size(block) for block in blocks]
    ends = sum(flops) + matrix_flops(head), _size(model)
    costs = [f / ends[0] + size / ends[1] for f, size in zip(flops, sizes, strict=True)]
    last = matrix_flops(head) / ends[0] + _size(head) / ends[1]
    return balanced(costs, _size(family.embedding(model)) / ends[1], last, stages.count)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def balanced(costs: Sequence[float], first: float, last: float, stages: int) -> list[int]:
    """How many of the blocks each of `stages` has, at least one, so that the largest sum is smallest, and
    among such splits the sum of squares. `first` and `last` are what the outer stages have besides. Of equal
    ones early stages have fewer blocks: they keep the activations of more micro-batches."""
    sums = [0.0, *accumulate(costs)]

    def cost_of(stage: int, start: int, end: int) -> float:
        return sums[end] - sums[start] + first * (stage == 0) + last * (stage == stages - 1)

    def search(add: Callable[[float, float], float], limit: float) -> tuple[float, list[int]]:
        """The split of smallest score, where no stage costs more than `limit`."""
        best: dict[int, tuple[float, list[int]]] = {0: (0.0, [])}  # of the stages so far on so many blocks
        for stage in range(stages):
            reached: dict[int, tuple[float, list[int]]] = {}
            for end in range(stage + 1, len(costs) - (stages - stage - 1) + 1):
                choices = [
                    (add(score, cost_of(stage, start, end)), [*counts, end - start])
                    for start, (score, counts) in best.items()
                    if start < end and cost_of(stage, start, end) <= limit
                ]
                if choices:
                    reached[end] = min(choices)
            best = reached
        return best[len(costs)]

    largest, _ = search(max, inf)
    return search(lambda score, cost: score + cost * cost, largest)[1]


# ---------------------------------------------------------------------------------------- parts


class Passage:
    """What enters and leaves a part in one forward pass, beside its arguments."""

    def __init__(self) -> None:
        self.states: Tensor | None = None  # from the stage before, then for the next
        self.carried: Tensor | None = None  # and what travels with them


class Absent(nn.Module):
    """Another stage's block: passes its input on."""

    def __init__(self, plan: StagePlan, passage: Passage, *, enters: bool) -> None:
        """`enters`: what is carried comes into the part here."""
        super().__init__()
        carried = plan.carried
        self._plan, self._passage, self._enters = plan, passage, enters
        self._keyword = carried.name if carried is not None and not carried.parameter else None

    def forward(self, states: Tensor, *_: Any, **arguments: Any) -> Any:
        if self._keyword is not None:
            if self._enters:
                arguments[self._keyword] = self._passage.carried
            self._passage.carried = arguments[self._keyword]
        return self._plan.passed(states, arguments)


class Entrance(nn.Module):
    """In the embedding's place on a later stage: the states that came in, whatever the tokens [..., L]."""

    def __init__(self, passage: Passage) -> None:
        super().__init__()
        self._passage = passage

    def forward(self, tokens: Tensor) -> Tensor:
        states = cast("Tensor", self._passage.states)
        return states.reshape(tokens.shape[0], -1, states.shape[-1])


class Exit(nn.Module):
    """In the final norm's place on an earlier stage: keeps the states for the next one."""

    def __init__(self, passage: Passage, tensor: int) -> None:
        """`tensor`: ranks among which the sequence is divided between blocks."""
        super().__init__()
        self._passage, self._tensor = passage, tensor

    def forward(self, states: Tensor) -> Tensor:
        self._passage.states = states
        rows, length, width = states.shape
        # what the model's code goes on with has the shape of the whole, and nobody reads it
        return states.new_zeros(()).expand(rows, length * self._tensor, width)


class Nothing(nn.Module):
    """In the place of what the first stage has added to the embedding already."""

    def forward(self, indices: Tensor) -> Tensor:
        return torch.zeros((), device=indices.device)


class Part:
    """A model cut down to one stage. Its names are the whole model's."""

    def __init__(
        self,
        model: nn.Module,
        family: Family,
        config: Any,
        counts: Sequence[int],
        stage: int,
        *,
        tensor: int = 1,
    ) -> None:
        """Cuts `model`, on meta, in place. `counts`: the blocks of each stage. `tensor`: ranks over which the
        model is divided already."""
        assert family.pipeline is not None
        self._tensor = tensor
        self.model, self.stage, self.stages = model, stage, len(counts)
        self.first, self.last = stage == 0, stage == len(counts) - 1
        self._plan, self._config, self._passage = family.pipeline, config, Passage()
        self.carried: Carried | None = self._carried()
        start = sum(counts[:stage])
        for number, (name, _) in enumerate(family.blocks(model)):
            if not start <= number < start + counts[stage]:
                absent = Absent(self._plan, self._passage, enters=number == 0 and not self.first)
                model.set_submodule(name, absent)
        if not self.first:
            model.set_submodule(family.embedding_name, Entrance(self._passage))
            for name in self._plan.added:
                model.set_submodule(name, Nothing())
            if self.carried is not None and self.carried.parameter:
                owner, name = self._owner()
                delattr(owner, name)
        if not self.last:
            model.set_submodule(self._plan.norm, Exit(self._passage, tensor))
            model.set_submodule(family.head_name, nn.Identity())

    def _carried(self) -> Carried | None:
        """A model may have its carried parameter left out by its config."""
        carried = self._plan.carried
        if carried is None or not carried.parameter:
            return carried
        return carried if any(name == carried.name for name, _ in self.model.named_parameters()) else None

    def _owner(self) -> tuple[nn.Module, str]:
        """The module that has the carried parameter, and its name there."""
        path, _, name = cast("Carried", self.carried).name.rpartition(".")
        return self.model.get_submodule(path), name

    def enter(self, received: Sequence[Tensor]) -> None:
        """Before a forward pass: what came from the stage before."""
        self._passage.states, self._passage.carried = (*received, None, None)[:2]
        if self.carried is not None and self.carried.parameter and not self.first:
            owner, name = self._owner()
            setattr(owner, name, self._passage.carried)

    def leave(self, compute: torch.dtype, rows: int) -> tuple[Tensor, ...]:
        """After a forward pass of so many rows: what goes to the next stage. Copies in one piece, which can
        be sent, and which the schedule may detach."""
        states = cast("Tensor", self._passage.states)
        leaving = [states.reshape(rows, -1, states.shape[-1])]
        if self.carried is not None:
            carried = self._passage.carried
            if self.carried.parameter:
                owner, name = self._owner()
                carried = getattr(owner, name)
            leaving.append(cast("Tensor", carried))
        self._passage.states = self._passage.carried = None
        whole = torch.contiguous_format
        return tuple(tensor.to(compute, copy=True, memory_format=whole) for tensor in leaving)

    def shapes(self, rows: int, length: int) -> list[tuple[int, ...]]:
        """Of what travels between stages for a micro-batch [rows, length]. Tensor ranks each send their part
        of the tokens, and of the channels of what is carried."""
        shapes: list[tuple[int, ...]] = [(rows, length // self._tensor, int(self._config.hidden_size))]
        if self.carried is not None:
            *sizes, channels = self.carried.shape(self._config, rows, length)
            shapes.append((*sizes, channels // self._tensor))
        return shapes


def present_blocks(family: Family, model: nn.Module) -> list[nn.Module]:
    """The blocks that a model has, cut down to a stage or whole."""
    return [block for _, block in family.blocks(model) if not isinstance(block, Absent)]


class Parts(nn.Module):
    """Several parts of one model on one rank, under the whole model's names. It is never run."""

    def __init__(self, parts: Iterable[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        for part in self.parts:
            yield from part.named_parameters(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        state: dict[str, Any] = {}
        for part in self.parts:
            state |= part.state_dict(*args, **kwargs)
        return state
