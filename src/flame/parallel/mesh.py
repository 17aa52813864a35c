"""How many ranks there are, and the mesh they make: which sizes are possible, and this rank's place."""

from __future__ import annotations

import os
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from flame.errors import RecipeError
from flame.parallel.config import ParallelConfig

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes of the mesh `pipeline x replicate x shard x context x tensor`, the last varying fastest over the
    ranks; filled in and known to fit the world."""

    replicate: int = 1
    shard: int = 1
    context: int = 1
    tensor: int = 1
    pipeline: int = 1

    @property
    def ranks(self) -> int:
        return self.data_ranks * self.context * self.tensor * self.pipeline

    @property
    def data_ranks(self) -> int:
        """Groups of ranks that read rows of their own."""
        return self.replicate * self.shard

    def place(self, rank: int) -> Place:
        """Where a rank stands."""
        rest, tensor = divmod(rank, self.tensor)
        rest, context = divmod(rest, self.context)
        pipeline, data = divmod(rest, self.data_ranks)
        return Place(data, context, tensor, pipeline)


@dataclass(frozen=True, slots=True)
class Place:
    """A rank's coordinates in the mesh. Ranks of the same `data` read the same rows."""

    data: int = 0
    context: int = 0
    tensor: int = 0
    pipeline: int = 0

    @property
    def speaks(self) -> bool:
        """Whether this rank counts the rows of its data rank for all of them."""
        return self.context == self.tensor == self.pipeline == 0

    @property
    def seed(self) -> tuple[int, ...]:
        """What tells this rank's random numbers from those of others on the same rows: the same over tensor
        ranks, and nothing where rows are not shared."""
        return (self.pipeline, self.context) if self.pipeline or self.context else ()


def resolve_layout(config: ParallelConfig, world_size: int) -> Layout:
    """The layout on `world_size` ranks; refused with the sizes that would work."""
    sizes = {name: getattr(config, name) for name in Layout.__slots__}
    for name, size in sizes.items():
        if size < 1 and (name, size) != ("shard", -1):
            allowed = "at least 1, or -1 for all ranks that are left" if name == "shard" else "at least 1"
            raise RecipeError(f"parallel.{name}: found {size}, expected {allowed}")
    shard = sizes.pop("shard")
    others = prod(sizes.values())
    named = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1) or "replicate 1"
    left, remainder = divmod(world_size, others)
    if remainder or not left:
        raise RecipeError(
            f"parallel: {named} does not divide the {world_size} ranks; products that do: "
            f"{_divisors(world_size)}; or start with --nproc {others}"
        )
    if shard not in (-1, left):
        raise RecipeError(
            f"parallel: {named} x shard {shard} is {others * shard} ranks, but there are "
            f"{world_size}; shard = {left} (or -1) fits, or start with --nproc {others * shard}"
        )
    _check_pipeline(config)
    return Layout(shard=left, **sizes)


def _check_pipeline(config: ParallelConfig) -> None:
    """Raises RecipeError for what a pipeline, whose blocks stay gathered for a step, leaves no choice of."""
    if config.pipeline == 1:
        return
    for name, value in {"reduce": config.reduce, "reshard": config.freed_after}.items():
        if value != "step":
            raise RecipeError(
                f'parallel.{name}: "{value}", but the stages of parallel.pipeline = {config.pipeline} gather '
                "parameters and reduce gradients once a step; leave it out, or use parallel.shard"
            )


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


def ranks_around() -> int | None:
    """How many ranks torchrun or srun started this process among; None where neither did."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    if "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        return int(os.environ["SLURM_NTASKS"])
    return None


@dataclass(frozen=True, slots=True)
class Meshes:
    """The device meshes of a layout, on the default process group. Sizes of 1 have none but `data`'s."""

    data: DeviceMesh  # FSDP2 shards over it, context ranks included; 2-D where there are replicas
    context: DeviceMesh | None
    tensor: DeviceMesh | None
    pipeline: DeviceMesh | None


def build_meshes(layout: Layout, device_type: str) -> Meshes:
    """The meshes of this rank. Needs a process group of `layout.ranks` ranks."""
    from flame.titan import build_dims  # torch and torchtitan: not for `flame --help`

    dims = build_dims(
        device_type,
        dp_replicate=layout.replicate,
        dp_shard=layout.shard,
        cp=layout.context,
        tp=layout.tensor,
        pp=layout.pipeline,
        world_size=layout.ranks,
    )
    data = dims.get_mesh(["dp_replicate", "fsdp"] if layout.replicate > 1 else "fsdp")
    return Meshes(
        data, dims.get_optional_mesh("cp"), dims.get_optional_mesh("tp"), dims.get_optional_mesh("pp")
    )
