"""A model of few layers and a made-up batch at a recipe's real shapes, on which kernels are prepared.

Kernels depend on widths, heads, dtypes and the tokens of a micro-batch, not on the number of layers, so one
layer of each kind reaches them all.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from flame.batch import IGNORED, Batch
from flame.models.build import build_on_meta
from flame.models.family import Family
from flame.parallel.apply import apply_parallelism
from flame.parallel.config import MemoryConfig
from flame.parallel.exchange import Alone
from flame.parallel.tensor import divide
from flame.train.loss import LossModule
from flame.train.shards import WholeModel

DOCUMENT_TOKENS = (37, 700, 150, 2000, 64, 1200, 380)  # lengths of made-up documents, again and again


def thin(model: nn.Module, family: Family) -> nn.Module:
    """Leaves the first layer of each kind, in place: kinds differ in their modules or in shapes."""
    seen: set[Any] = set()
    kept: list[nn.Module] = []
    for _, block in family.blocks(model):
        modules = tuple((name, type(module)) for name, module in block.named_modules())
        shapes = tuple((name, tuple(p.shape)) for name, p in block.named_parameters())
        if (modules, shapes) not in seen:
            seen.add((modules, shapes))
            kept.append(block)
    parent, _, name = family.layers.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.ModuleList(kept))
    return model


def small_model(
    config: Any,
    family: Family,
    compute: torch.dtype,
    device: torch.device,
    *,
    compile_blocks: bool,
    tensor_ranks: int = 1,
) -> tuple[LossModule, WholeModel]:
    """The thinned model with its loss, as one rank of `tensor_ranks` trains it, with nobody to talk to; its
    values are of a common size."""
    model = thin(build_on_meta(config), family)
    with_loss = LossModule(model, family.hidden, family.head(model))
    blocks = [block for _, block in family.blocks(model)]
    if tensor_ranks > 1:
        exchange = Alone(tensor_ranks)
        divide(model, family, exchange)
        with_loss.divide_vocabulary(exchange)
    apply_parallelism(
        with_loss, blocks, None, compute=compute, compile_blocks=compile_blocks, memory=MemoryConfig()
    )
    model.to_empty(device=device)
    with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        for parameter in model.parameters():
            _ = parameter.normal_(std=0.02) if parameter.ndim > 1 else parameter.fill_(1.0)
        for buffer in model.buffers():
            buffer.zero_()
    return with_loss, WholeModel(model, compute)


def made_up_batch(
    rows: int, length: int, longest: int, vocabulary: int, device: torch.device, seed: int = 0
) -> Batch:
    """A micro-batch [rows, length] of packed documents, the first of `longest` tokens; another seed has
    other lengths after it."""
    numbers = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocabulary, (rows, length), generator=numbers)
    lengths = [n for row in range(rows) for n in _lengths(length, min(longest, length), seed + row)]
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    positions = torch.cat([torch.arange(n) for n in lengths]).view(rows, length)
    labels = tokens.roll(-1).flatten()
    labels[bounds[1:] - 1] = IGNORED
    batch = Batch(tokens, labels.view(rows, length), positions, bounds.int(), max(lengths), first_row=seed)
    return batch.to(device)


def _lengths(left: int, first: int, turn: int) -> Iterator[int]:
    wanted = first
    while left > 0:
        yield min(wanted, left)
        left -= wanted
        wanted = DOCUMENT_TOKENS[turn % len(DOCUMENT_TOKENS)]
        turn += 1


def forward_backward(model: LossModule, batch: Batch) -> float:
    """One micro-batch there and back; its loss. The gradients are dropped."""
    loss: torch.Tensor = model(batch)
    loss.backward()
    for parameter in model.parameters():
        parameter.grad = None
    return float(loss.detach())
