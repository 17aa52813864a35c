"""What a layout needs, told without a GPU: each rank's memory and what it sends in a step.

The model is built on meta and divided by the same code that trains it, in a process group that only pretends
to have so many ranks. Parameters, gradients and the optimizer's state are exact; activations are an estimate.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from flame.errors import RecipeError
from flame.guest import check_fits, divided, parameter_groups
from flame.kernels import compute_dtype, fresh_micro_batch_rows
from flame.models.build import build_on_meta
from flame.models.family import Family
from flame.models.registry import family_of
from flame.origin import model_config
from flame.parallel.apply import apply_parallelism
from flame.parallel.mesh import Layout, build_meshes, resolve_layout
from flame.parallel.pipeline import Stages, present_blocks
from flame.parallel.world import World
from flame.recipe import Recipe
from flame.train.groups import ParameterGroups

GPU = torch.device("cuda")  # the plan is for GPUs, whether there is one here or not
STATES = {"adamw": 2, "muon": 1, "sgd": 1}  # float32 numbers that an optimizer keeps for each parameter
GRADIENT_SUMS = 4  # bytes of a gradient: float32
RESERVED = 2 * 2**30  # bytes that CUDA, NCCL and the allocator's gaps take of a GPU


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Bytes on one rank; `parameters` is a count."""

    rank: int
    pipeline_stage: int  # the rank's place in the pipeline
    parameters: int
    masters: int  # float32
    gradients: int
    optimizer: int
    gathered: (
        int  # what is there whole for a time: parameters in the compute dtype, gradients not reduced yet
    )
    activations: int

    @property
    def total(self) -> int:
        parts = self.masters, self.gradients, self.optimizer, self.gathered, self.activations
        return sum(parts) + RESERVED


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes that a rank sends in a step, by what they are for."""

    shard: int  # parameters gathered, gradients reduced
    replicate: int  # gradients summed over copies
    tensor: int
    context: int
    pipeline: int


@dataclass(frozen=True, slots=True)
class LayoutPlan:
    """What a recipe needs on so many ranks."""

    layout: Layout
    model_parameters: int
    micro_batch_rows: int
    micro_batches: int  # a step, on each rank
    tokens_per_step: int
    ranks: list[RankMemory]  # one for each place in the pipeline
    traffic: Traffic  # of the rank that sends most

    @property
    def most(self) -> RankMemory:
        return max(self.ranks, key=lambda rank: rank.total)

    def record(self) -> dict[str, Any]:
        """As `--json` has it."""
        ranks = [{**asdict(rank), "total": rank.total} for rank in self.ranks]
        return {**asdict(self), "ranks": ranks}


def plan_layout(recipe: Recipe, ranks: int) -> LayoutPlan:
    """The plan of a recipe on `ranks` ranks, of its first stage of the data. Raises RecipeError and
    ModelError as training would."""
    config = model_config(recipe)
    family = family_of(config)
    layout = resolve_layout(recipe.parallel, ranks)
    whole = build_on_meta(config)
    groups = parameter_groups(recipe, family, whole)
    plan = recipe.plan
    memories: list[RankMemory] = []
    traffics: list[Traffic] = []
    rows = batches = 0
    for stage in range(layout.pipeline):
        rank = stage * layout.data_ranks * layout.context * layout.tensor
        with pretended(rank, ranks) as world:
            stages = check_fits(recipe, world, family, config, layout)
            [rows, *_] = fresh_micro_batch_rows(
                recipe, plan, layout.data_ranks, GPU, stages.count if stages is not None else 0
            )
            batches = -(-plan.stages[0].rows_per_step // (layout.data_ranks * rows))
            part = part_of(recipe, family, config, whole, layout, stages, rank)
        tokens = rows * plan.stages[0].sequence_length // layout.context
        memories.append(memory_of(recipe, groups, part, rank, batches, tokens))
        traffics.append(traffic_of(recipe, part, batches, tokens))
    size = sum(parameter.numel() for parameter in whole.parameters())
    most = max(traffics, key=lambda traffic: sum(asdict(traffic).values()))
    return LayoutPlan(layout, size, rows, batches, recipe.batch.tokens_per_step, memories, most)


@contextmanager
def pretended(rank: int, ranks: int) -> Generator[World]:
    """A world of so many ranks in which nobody answers: meshes and shards have their shapes."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RecipeError("a plan is made outside of a training process")
    store = FakeStore()
    dist.init_process_group("fake", store=store, rank=rank, world_size=ranks)
    try:
        group = dist.distributed_c10d._get_default_group()  # pyright: ignore[reportPrivateUsage]
        yield World(rank, ranks, 0, GPU, group, group, store)
    finally:
        dist.destroy_process_group()


@dataclass(frozen=True, slots=True)
class Part:
    """What one rank has of the model, in numbers."""

    layout: Layout
    stages: Stages | None
    stage: int
    local: dict[str, int]  # sizes of the parameters that it keeps, by name
    unsharded: int  # parameters of its part before they are sharded
    largest_unit: int  # the parameters of a block, gathered at once
    root: int  # those that belong to no block, gathered for a whole pass
    blocks: int
    width: int  # of the hidden states
    vocabulary: int  # of its part of the head; 0 where it has none
    saved: int  # numbers that a block keeps for each token, about
    products: int  # those of them that matrix products and the mixer give
    compute_bytes: int


def part_of(
    recipe: Recipe,
    family: Family,
    config: Any,
    whole: nn.Module,
    layout: Layout,
    stages: Stages | None,
    rank: int,
) -> Part:
    """The part of a rank of the pretended world."""
    compute, place = compute_dtype(recipe, GPU), layout.place(rank)
    meshes = build_meshes(layout, "cpu") if layout.ranks > 1 else None
    if stages is None:
        whole = build_on_meta(config)  # it is divided in place
    modules = divided(recipe, family, config, whole, meshes, stages, place, compute)
    blocks = [block for module in modules for block in present_blocks(family, module.guest)]
    unsharded = sum(plain(p).numel() for module in modules for p in module.guest.parameters())
    units = [sum(plain(p).numel() for p in block.parameters()) for block in blocks]
    width = int(family.embedding(whole).weight.shape[1]) if stages is None else int(config.hidden_size)
    saved = [saved_numbers(block, width) for block in blocks]
    heads = [module.head for module in modules if module.head is not None]
    vocabulary = sum(plain(head.weight).shape[0] for head in heads)
    for module in modules:
        present = present_blocks(family, module.guest)
        apply_parallelism(
            module, present, meshes, compute=compute, compile_blocks=False, memory=recipe.memory
        )  # what stays gathered, and when gradients are reduced, is counted in `memory_of` and `traffic_of`
    return Part(
        layout=layout,
        stages=stages,
        stage=place.pipeline,
        local={name: plain(p).numel() for module in modules for name, p in module.guest.named_parameters()},
        unsharded=unsharded,
        largest_unit=max(units, default=0),
        root=unsharded - sum(units),
        blocks=len(blocks),
        width=width,
        vocabulary=vocabulary,
        saved=max((both[0] for both in saved), default=0),
        products=max((both[1] for both in saved), default=0),
        compute_bytes=torch.finfo(compute).bits // 8,
    )


def memory_of(
    recipe: Recipe, groups: ParameterGroups, part: Part, rank: int, batches: int, tokens: int
) -> RankMemory:
    """The bytes of a rank whose micro-batches have `tokens` tokens each, `batches` of them a step."""
    count = sum(part.local.values())
    average = 0 if recipe.optimizer.ema is None else 1
    states = sum((STATES[groups.of[name].optimizer] + average) * size for name, size in part.local.items())
    if part.layout.ranks == 1:  # copies in the compute dtype, and a micro-batch's gradients in it
        gathered = 2 * part.compute_bytes * count
    else:
        by_block = part.root + 2 * part.largest_unit  # the one at work, and the one after it
        gathered = part.compute_bytes * (
            by_block if recipe.parallel.freed_after == "forward" else part.unsharded
        )
        waiting = batches > 1 and recipe.parallel.reduce == "step"  # for the last micro-batch
        gathered += GRADIENT_SUMS * (part.unsharded if waiting else max(part.largest_unit, part.root))
    return RankMemory(
        rank=rank,
        pipeline_stage=part.stage,
        parameters=count,
        masters=4 * count,
        gradients=GRADIENT_SUMS * count,
        optimizer=4 * states,
        gathered=gathered,
        activations=activations_of(recipe, part, batches, tokens),
    )


def activations_of(recipe: Recipe, part: Part, batches: int, tokens: int) -> int:
    """An estimate: what each linear layer gives, each norm takes and a mixer gives is kept for the backward
    pass, and at the head the gradient of the states and of the matrix."""
    number = part.compute_bytes * tokens // part.layout.tensor
    whole, mode = part.saved * number, recipe.memory.recompute
    numbers = {"none": part.saved, "selective": part.products, "full": part.width, "offload": 0}
    kept = numbers[mode] * number
    again = -(-part.blocks // recipe.memory.recompute_every) if mode != "none" else 0
    in_flight = micro_batches_in_flight(part, batches)
    total = in_flight * (again * kept + (part.blocks - again) * whole)
    if again:
        total += whole  # of the block that is computed again
    if part.vocabulary:
        total += 2 * part.width * number + GRADIENT_SUMS * part.vocabulary * part.width
    return total


def micro_batches_in_flight(part: Part, batches: int) -> int:
    """Whose activations a rank holds at once."""
    if part.stages is None:
        return 1
    if part.stages.schedule == "gpipe":
        return batches
    if part.stages.schedule == "1f1b":
        return min(batches, part.layout.pipeline - part.stage)
    return min(batches, part.layout.pipeline)


def traffic_of(recipe: Recipe, part: Part, batches: int, tokens: int) -> Traffic:
    """What a rank sends in a step. `tokens`: of a micro-batch on it."""
    layout, states = part.layout, part.width * part.compute_bytes * tokens
    sharded = layout.shard * layout.context

    def others(size: int) -> float:  # the share of a whole that is on other ranks
        return (size - 1) / size

    reductions = batches if recipe.parallel.reduce == "micro_batch" else 1
    gathers = {  # a block freed after its forward pass is gathered for its backward pass again
        "forward": batches * (2 * part.unsharded - part.root),
        "micro_batch": batches * part.unsharded,
        "step": part.unsharded,
    }[recipe.parallel.freed_after]
    gathered = part.compute_bytes * gathers + GRADIENT_SUMS * reductions * part.unsharded
    summed = 2 * GRADIENT_SUMS * sum(part.local.values())
    boundaries = 0 if part.stages is None else 2 * part.stages.per_rank
    return Traffic(
        shard=int(others(sharded) * gathered),
        replicate=int(others(layout.replicate) * summed),
        # there and back: gathered before the mixer and before the feed-forward, and summed after each
        tensor=int(others(layout.tensor) * 8 * part.blocks * batches * states),
        # queries, keys, values and outputs change places, there and back
        context=int(others(layout.context) * 8 * part.blocks * batches * states),
        pipeline=boundaries * batches * states // layout.tensor,
    )


def saved_numbers(block: nn.Module, width: int) -> tuple[int, int]:
    """Numbers that a block keeps for each token: all that it saves, about, and the products alone."""
    products, norms = width, 0  # what the mixer gives
    for module in block.modules():
        if isinstance(module, nn.Linear):
            products += module.weight.shape[0]
        elif isinstance(module, Conv1D):
            products += module.weight.shape[1]
        elif "Norm" in type(module).__name__:
            norms += width
    return products + norms, products


def plain(parameter: torch.Tensor) -> torch.Tensor:
    """What this rank has of it."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter
