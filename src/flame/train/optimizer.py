"""The optimizers of a model's parameters, stepped as one."""

from __future__ import annotations

from typing import Any

import torch

from flame.train.config import OptimizerConfig
from flame.train.groups import Group, ParameterGroups
from flame.train.muon import Muon
from flame.train.shards import Piece, Shards


class Optimizers(torch.optim.Optimizer):
    """Several optimizers over disjoint parameters, as one: one list of groups, one state.

    Each group of `param_groups` also holds `names`, those of its parameters, and `rate_factor`: its peak
    learning rate as a multiple of the schedule's. With `ema` the state of each parameter also holds `ema`,
    the average of its values, float32: it begins as the initial weights, and goes 1 - ema of the way to
    the new ones after each update.

    `found_inf`, float32 scalar on the device or None, is set before a step, as torch's gradient scaler
    does: where it is 1, parameters and state stay as they are, and the host need not know.
    """

    def __init__(
        self, parts: list[torch.optim.Optimizer], groups: ParameterGroups, *, ema: float | None = None
    ) -> None:
        """`groups`: of the whole model's parameters, to be shown."""
        super().__init__([group for part in parts for group in part.param_groups], {})
        self.parts = parts
        self.groups = groups
        self.found_inf: torch.Tensor | None = None
        self._ema = ema
        for part in parts:
            self.state.update(part.state)
            part.state = self.state

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Updates all parameters that have gradients."""
        fresh: dict[torch.Tensor, torch.Tensor] = {}
        if self._ema is not None:
            held = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
            fresh = {p: p.detach().clone() for p in held if "ema" not in self.state.get(p, {})}
        for part in self.parts:
            part.found_inf = self.found_inf  # type: ignore[attr-defined]
            part.grad_scale = None  # type: ignore[attr-defined]
            part.step()
        if self._ema is None:
            return
        for parameter, begin in fresh.items():  # not before: AdamW takes any state for its own
            self.state[parameter]["ema"] = begin
        weight: Any = 1 - self._ema
        if self.found_inf is not None:
            weight = (1 - self.found_inf) * weight
        for parameter, state in self.state.items():
            if "ema" in state:
                state["ema"].lerp_(parameter, weight)


def build_optimizer(
    shards: Shards, config: OptimizerConfig, groups: ParameterGroups, *, fused: bool
) -> Optimizers:
    """The optimizers of this rank's `shards`; `groups` may be of more parameters than it has.

    `fused`: one kernel for all, on GPUs. The CPU form of fused AdamW rounds the last few elements of a shard
    otherwise than the rest, so that the result would depend on the number of ranks. The learning rate is set
    before each step from the schedule.
    """
    members: dict[Group, list[Piece]] = {}
    for piece in shards.pieces:
        members.setdefault(groups.of[piece.name], []).append(piece)
    by_optimizer: dict[str, list[dict[str, Any]]] = {}
    for group, pieces in members.items():
        by_optimizer.setdefault(group.optimizer, []).append(_param_group(group, pieces, config))
    parts: list[torch.optim.Optimizer] = []
    if found := by_optimizer.get("adamw"):
        betas = (config.beta1, config.beta2)
        parts.append(
            torch.optim.AdamW(found, betas=betas, eps=config.epsilon, fused=fused, foreach=not fused)
        )
    if found := by_optimizer.get("sgd"):
        parts.append(_sgd(found, config, fused))
    if found := by_optimizer.get("muon"):
        parts.append(Muon(found, shards.pieces, momentum=config.momentum, adjust_lr_fn=config.adjust_lr_fn))
    return Optimizers(parts, groups, ema=config.ema)


def _param_group(group: Group, pieces: list[Piece], config: OptimizerConfig) -> dict[str, Any]:
    peak = config.learning_rate
    return {
        "params": [piece.local for piece in pieces],
        "names": [piece.name for piece in pieces],
        "lr": group.learning_rate,
        "rate_factor": group.learning_rate / peak if group.learning_rate != peak else 1.0,
        "weight_decay": group.weight_decay,
    }


def _sgd(groups: list[dict[str, Any]], config: OptimizerConfig, fused: bool) -> torch.optim.SGD:
    """SGD whose momentum begins at zero: what a fused step leaves uninitialised where it is left out."""
    sgd = torch.optim.SGD(groups, momentum=config.momentum, fused=fused, foreach=not fused)
    if config.momentum:
        for group in sgd.param_groups:
            for parameter in group["params"]:
                sgd.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return sgd


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Gives each group its multiple of the schedule's rate."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("rate_factor", 1.0)
