"""The parallelisms, on a model built on meta, in one order: context, tensor, recompute, compile, shard."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from flame.parallel.config import MemoryConfig
from flame.parallel.context_mixers import install
from flame.parallel.exchange import Exchange
from flame.parallel.fsdp import shard
from flame.parallel.recompute import recompute_block

if TYPE_CHECKING:
    from flame.parallel.mesh import Meshes


def apply_parallelism(
    root: nn.Module,
    blocks: Iterable[nn.Module],
    meshes: Meshes | None,
    *,
    compute: torch.dtype,
    compile_blocks: bool,
    memory: MemoryConfig,
    divide: Callable[[Exchange], None] | None = None,
) -> None:
    """Changes `root` in place; parameter names stay as they are. `meshes`: None where there is one rank.
    `divide` applies the model's tensor plan."""
    blocks = list(blocks)
    if meshes is not None and meshes.context is not None:
        install()  # first: a divided layer keeps the functions that it finds
    if meshes is not None and meshes.tensor is not None and divide is not None:
        divide(Exchange(meshes.tensor))
    if memory.recompute != "none":
        for block in blocks[:: memory.recompute_every]:
            recompute_block(block, memory.recompute)
    if compile_blocks:
        for block in blocks:
            compile_block(block)
    if meshes is not None:
        shard(root, blocks, meshes.data, compute)


def compile_block(block: nn.Module) -> None:
    """Compiles a block's forward. FSDP's hooks stay outside, so that nothing breaks the graph."""
    forward: Any = torch.compile(block.forward)
    block.forward = forward
