"""Compiled blocks are compiled for the first steps alone, whatever documents later rows hold."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from models.small_models import SMALL
from torch._dynamo.utils import counters

from flame.models import attention
from flame.models.build import build_on_meta, initialize
from flame.models.registry import families, family_of
from flame.parallel.apply import apply_parallelism
from flame.parallel.config import MemoryConfig
from flame.train.loss import LossModule
from flame.train.rehearsal import forward_backward, made_up_batch
from flame.train.validation import evaluating

CPU = torch.device("cpu")
COMPILED = [family.name for family in families() if family.compiles]
LONGEST = (40, 64, 33, 60, 50, 17, 9, 128, 100, 5, 40, 64, 3, 128)  # tokens of a batch's first document
WARM = 4  # steps, and a validation pass


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # torch's own, while it traces
@pytest.mark.parametrize("name", COMPILED)
def test_no_block_is_compiled_anew_for_other_document_bounds(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs are counted by the frontend, without a compiler behind it. Attention on a CPU is a loop over
    documents; it stays outside, as the GPU's kernel does."""
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(attention, "varlen_attention", torch.compiler.disable(attention.varlen_attention))
    config = SMALL[name]
    family = family_of(config)
    model = build_on_meta(config)
    module = LossModule(model, family.hidden, family.head(model))
    blocks = [block for _, block in family.blocks(model)]
    with monkeypatch.context() as patched:
        patched.setattr(torch, "compile", partial(torch.compile, backend="eager"))
        apply_parallelism(
            module, blocks, None, compute=torch.float32, compile_blocks=True, memory=MemoryConfig()
        )
    initialize(model, config, 1, CPU)
    graphs: list[int] = []
    bounds: set[tuple[int, ...]] = set()
    for step, longest in enumerate(LONGEST):
        batch = made_up_batch(2, 128, longest, config.vocab_size, CPU, step)
        bounds.add(tuple(batch.cu_seqlens.tolist()))
        forward_backward(module, batch)
        if step % WARM == WARM - 1:
            with evaluating(module, CPU):
                module(batch)
        graphs.append(counters["stats"]["unique_graphs"])
    assert len(bounds) > 8 and len({len(found) for found in bounds}) > 2
    assert graphs[0] >= len(blocks)
    assert graphs[WARM - 1 :] == [graphs[-1]] * (len(LONGEST) - WARM + 1), graphs
