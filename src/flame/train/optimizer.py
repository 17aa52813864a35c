"""Optimizers over parameter groups with and without weight decay."""

from __future__ import annotations

import torch
from torch import nn

from flame.train.config import OptimizerConfig
from flame.train.shards import Shards


def build_optimizer(
    shards: Shards,
    config: OptimizerConfig,
    no_decay: set[str],
    *,
    fused: bool,
) -> torch.optim.Optimizer:
    """AdamW over this rank's `shards`; parameters named in `no_decay` do not decay.

    `fused`: one kernel for all, on GPUs. Its CPU form rounds the last few elements of a shard otherwise
    than the rest, so that the result would depend on the number of ranks. The learning rate is set
    before each step from the schedule.
    """
    decayed: list[nn.Parameter] = []
    exempt: list[nn.Parameter] = []
    for piece in shards.pieces:
        (exempt if piece.name in no_decay else decayed).append(piece.local)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": exempt, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=fused,
        foreach=not fused,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
