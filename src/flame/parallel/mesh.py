"""How many ranks there are, and the mesh they make: which sizes are possible."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flame.errors import RecipeError
from flame.parallel.config import ParallelConfig

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes of the mesh `dp_replicate x dp_shard`, filled in and known to fit the world."""

    replicate: int
    shard: int

    @property
    def data_ranks(self) -> int:
        """Ranks that read rows of their own."""
        return self.replicate * self.shard


def resolve_layout(config: ParallelConfig, world_size: int) -> Layout:
    """The layout on `world_size` ranks; refused with the sizes that would work."""
    replicate, shard = config.replicate, config.shard
    if replicate < 1 or world_size % replicate:
        raise RecipeError(
            f"parallel.replicate: {replicate} does not divide the {world_size} ranks; "
            f"sizes that do: {_divisors(world_size)}"
        )
    left = world_size // replicate
    if shard not in (-1, left):
        raise RecipeError(
            f"parallel: replicate {replicate} x shard {shard} is {replicate * shard} ranks, but there are "
            f"{world_size}; shard = {left} (or -1) fits, or start with --nproc {max(replicate * shard, 1)}"
        )
    return Layout(replicate, left)


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)


def ranks_around() -> int | None:
    """How many ranks torchrun or srun started this process among; None where neither did."""
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        return int(os.environ["WORLD_SIZE"])
    if "SLURM_PROCID" in os.environ and int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        return int(os.environ["SLURM_NTASKS"])
    return None


def data_mesh(layout: Layout, device_type: str) -> DeviceMesh:
    """The mesh that FSDP2 shards (and replicates) over: 1-D, or 2-D with replicas. Needs a process group."""
    from flame.titan import build_dims  # torch and torchtitan: not for `flame --help`

    dims = build_dims(
        device_type,
        dp_replicate=layout.replicate,
        dp_shard=layout.shard,
        world_size=layout.replicate * layout.shard,
    )
    return dims.get_mesh(["dp_replicate", "fsdp"] if layout.replicate > 1 else "fsdp")
