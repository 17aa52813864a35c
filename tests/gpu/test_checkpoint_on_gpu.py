"""Checkpoints of a model on a GPU: each holds what was there when it began, the second as the first."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed.ranks import Ranks
from torch import nn

from flame.parallel.world import join_world
from flame.train.checkpoint import Checkpointer, Records, tensors_of
from flame.train.keeping import saved_steps, step_directory
from flame.train.saved_tensors import SavedTensors
from flame.train.shards import WholeModel

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def save_three_times(run: Path) -> int:
    world = join_world()
    model = nn.Linear(300, 500, device=world.device)
    shards = WholeModel(model, torch.bfloat16)
    optimizer = torch.optim.AdamW([piece.local for piece in shards.pieces], fused=True)
    checkpointer = Checkpointer(run, world.checkpoint, keep=3)
    for step in (1, 2, 3):
        with torch.no_grad():
            for piece in shards.pieces:
                piece.local.fill_(float(step))
        checkpointer.save(step, tensors_of(model, shards, optimizer), Records(train={"step": step}, data={}))
        with torch.no_grad():  # training goes on while the save is under way
            for piece in shards.pieces:
                piece.local.fill_(-1.0)
    checkpointer.wait()
    assert checkpointer.error is None, checkpointer.error
    dist.destroy_process_group()
    return 0


def test_each_of_several_saves_holds_its_own_step(tmp_path: Path) -> None:
    assert Ranks(1, save_three_times, tmp_path).codes() == [0]
    assert saved_steps(tmp_path) == [1, 2, 3]
    for step in (1, 2, 3):
        for name, tensor in SavedTensors(step_directory(tmp_path, step)).items():
            assert bool((tensor == step).all()), (step, name)
