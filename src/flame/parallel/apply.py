"""The parallelisms, on a model on meta, in one order: context, tensor, stages, recompute, compile, shard."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from flame.parallel.config import MemoryConfig
from flame.parallel.exchange import Exchange
from flame.parallel.fsdp import shard
from flame.parallel.recompute import recompute_block

if TYPE_CHECKING:
    from flame.parallel.mesh import Meshes


def meet_ranks(meshes: Meshes | None) -> Exchange | None:
    """Before a model is divided: what mixes tokens learns of rows that lie on several ranks. What the tensor
    ranks divide the model with, None where there are none."""
    if meshes is not None and meshes.context is not None:
        from flame.parallel.context_mixers import install  # with fla, whose import touches a GPU

        install()  # first: a divided layer keeps the functions that it finds
    return Exchange(meshes.tensor) if meshes is not None and meshes.tensor is not None else None


def apply_parallelism(
    root: nn.Module,
    blocks: Iterable[nn.Module],
    meshes: Meshes | None,
    *,
    compute: torch.dtype,
    compile_blocks: bool,
    memory: MemoryConfig,
    keep_gathered: bool = False,
) -> None:
    """The rest, on a whole model or a stage of it, divided already (`parallel.tensor`, `parallel.pipeline`).

    Changes `root` in place; parameter names stay as they are. `meshes`: None where there is one rank.
    `keep_gathered`: as `parallel.fsdp.shard` has it.
    """
    blocks = list(blocks)
    if memory.recompute != "none":
        for block in blocks[:: memory.recompute_every]:
            recompute_block(block, memory.recompute)
    if compile_blocks:
        for block in blocks:
            compile_block(block)
    if meshes is not None:
        shard(root, blocks, meshes.data, compute, keep_gathered=keep_gathered)


def compile_block(block: nn.Module) -> None:
    """Compiles a block's forward. FSDP's hooks stay outside, so that nothing breaks the graph."""
    forward: Any = torch.compile(block.forward)
    block.forward = forward
