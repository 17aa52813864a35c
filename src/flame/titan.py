"""The one door to torchtitan, pinned to 0.3.0: what flame uses of it is imported here and nowhere else.

`docs/decisions/0001-built-on-torchtitan.md` says what is used, what is not, and why.
"""

from __future__ import annotations

import logging

from torchtitan.distributed import parallel_dims
from torchtitan.distributed.parallel_dims import ParallelDims

__all__ = ["ParallelDims", "build_dims"]


def build_dims(
    device_type: str,
    *,
    dp_replicate: int,
    dp_shard: int,
    cp: int = 1,
    tp: int = 1,
    pp: int = 1,
    world_size: int,
) -> ParallelDims:
    """torchtitan's mesh `pp x dp_replicate x dp_shard x cp x tp` on the default process group."""
    # 0.3.0 takes the device type from a module constant, which says "cuda" where there is no GPU.
    parallel_dims.device_type = device_type
    logging.getLogger("torchtitan").setLevel(logging.WARNING)
    dims = ParallelDims(
        dp_replicate=dp_replicate,
        dp_shard=dp_shard,
        cp=cp,
        tp=tp,
        pp=pp,
        ep=1,
        world_size=world_size,
        spmd_backend="partial_dtensor",
    )
    dims.build_mesh()
    return dims
