"""Blocks computed again in the backward pass give the same gradients, bit for bit."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from models.small_models import SMALL, initialized, packed

from flame.batch import IGNORED, Batch
from flame.models.registry import family_of
from flame.parallel.apply import apply_parallelism
from flame.parallel.config import MemoryConfig
from flame.train.loss import LossModule

ROWS = [[5, 20, 1, 14], [40]]
NAMES = ("llama", "gla", "gated_deltanet", "rwkv7", "mamba2", "gsa-hybrid")


def batch() -> Batch:
    tokens, positions, cu_seqlens, longest = packed(ROWS)
    labels = tokens.roll(-1)
    labels.view(-1)[cu_seqlens[1:].long() - 1] = IGNORED
    return Batch(tokens, labels, positions, cu_seqlens, longest, 0)


def gradients(name: str, memory: MemoryConfig) -> tuple[dict[str, torch.Tensor], Counter[int], int]:
    """The gradients, how often each block's forward ran, and bytes kept between forward and backward."""
    config = SMALL[name]
    model, family = initialized(config), family_of(config)
    ran: Counter[int] = Counter()
    blocks = [block for _, block in family.blocks(model)]
    for number, block in enumerate(blocks):
        count_calls(block, number, ran)
    module = LossModule(model, family.hidden, family.head(model))
    apply_parallelism(module, blocks, None, compute=torch.float32, compile_blocks=False, memory=memory)
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = module(batch())
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}, ran, sum(kept.values())


def count_calls(block: Any, number: int, ran: Counter[int]) -> None:
    forward = block.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        ran[number] += 1
        return forward(*args, **kwargs)

    block.forward = counted


@pytest.mark.parametrize("how", ["full", "offload", "selective"])
@pytest.mark.parametrize("name", NAMES)
def test_the_gradients_are_the_same_and_less_is_kept(name: str, how: str) -> None:
    plain, ran_once, kept_plain = gradients(name, MemoryConfig())
    again, ran, kept = gradients(name, MemoryConfig(how))
    assert ran_once == {0: 1, 1: 1}
    assert ran == {0: 2, 1: 2}
    assert plain.keys() == again.keys()
    for parameter, gradient in plain.items():
        assert torch.equal(gradient, again[parameter]), parameter
    assert kept < kept_plain


def test_every_second_block_only() -> None:
    _, ran, _ = gradients("llama", MemoryConfig("full", recompute_every=2))
    assert ran == {0: 2, 1: 1}
