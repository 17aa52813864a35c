"""The parallelisms, applied to a model built on meta, in their one order: compile, then shard."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from flame.parallel.fsdp import shard

if TYPE_CHECKING:
    from flame.parallel.mesh import Meshes


def apply_parallelism(
    root: nn.Module,
    blocks: Iterable[nn.Module],
    meshes: Meshes | None,
    *,
    compute: torch.dtype,
    compile_blocks: bool,
) -> None:
    """Changes `root` in place; parameter names stay as they are. `meshes`: None where there is one rank."""
    blocks = list(blocks)
    if compile_blocks:
        for block in blocks:
            compile_block(block)
    if meshes is not None:
        # a stage meets its blocks again with the next micro-batch: they are gathered once a step
        shard(root, blocks, meshes.data, compute, keep_gathered=meshes.pipeline is not None)


def compile_block(block: nn.Module) -> None:
    """Compiles a block's forward. FSDP's hooks stay outside, so that nothing breaks the graph."""
    forward: Any = torch.compile(block.forward)
    block.forward = forward
