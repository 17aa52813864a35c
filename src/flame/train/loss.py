"""The loss: next-token cross-entropy, summed over predicted tokens. It belongs to the trainer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from flame.batch import IGNORED, Batch

CHUNK_TOKENS = 4096  # logits of so many tokens are in memory at a time, on CPU

# What is made of the states before the head, [n, d], the head, and the labels, [n]
Reading = Callable[[torch.Tensor, nn.Linear, torch.Tensor], torch.Tensor]
HiddenStates = Callable[[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]


class LossModule(nn.Module):
    """A guest model with its loss inside `forward`, so that FSDP's hooks surround both.

    `hidden` gives the states before the head, [b, L, d]; `head` is the guest's output projection.
    """

    def __init__(self, guest: nn.Module, hidden: HiddenStates, head: nn.Linear, z_loss: float = 0.0) -> None:
        """`z_loss`: a penalty of so many times the square of each logsumexp of the logits, in training."""
        super().__init__()
        self.guest = guest
        self._hidden = hidden
        self._z_loss = z_loss
        self._penalties: list[torch.Tensor] = []  # since they were last taken
        object.__setattr__(self, "_head", head)  # a part of the guest already: not registered twice

    def forward(self, batch: Batch, read: Reading | None = None) -> torch.Tensor:
        """The sum of cross-entropy over the batch's predicted tokens: a float32 scalar. With `z_loss` its
        gradient is that of cross-entropy and penalty; `take_penalty` has the penalty's value. `read`: what
        it makes of the same states instead."""
        # a bound that is nearly always the same: compiled blocks take it for a constant
        longest = 1 << (batch.longest_segment - 1).bit_length()
        states = self._hidden(self.guest, batch.tokens, batch.positions, batch.cu_seqlens, longest)
        head = cast("nn.Linear", self._head)
        flat, labels = states.reshape(-1, states.shape[-1]), batch.labels.reshape(-1)
        if read is not None:
            return read(flat, head, labels)
        if self._z_loss and torch.is_grad_enabled():
            loss, squares = cross_entropy_and_squares(flat, head.weight, head.bias, labels)
            penalty = self._z_loss * squares
            self._penalties.append(penalty.detach())
            return loss + (penalty - penalty.detach())
        if flat.is_cuda:
            return fused_cross_entropy(flat, head.weight, head.bias, labels)
        return chunked_cross_entropy(flat, head.weight, head.bias, labels)

    def take_penalty(self) -> torch.Tensor | None:
        """The penalty over the micro-batches since it was last taken, a float64 scalar; None without one."""
        taken, self._penalties = self._penalties, []
        return torch.stack(taken).double().sum() if taken else None


def chunked_cross_entropy(
    states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor
) -> torch.Tensor:
    """Summed cross-entropy of `states [n, d] @ weight.T` against `labels [n]`, a chunk at a time."""

    def chunk_loss(states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = F.linear(states, weight, bias).float()
        return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")

    return _over_chunks(chunk_loss, states, labels)


def cross_entropy_and_squares(
    states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor
) -> torch.Tensor:
    """Summed cross-entropy, and the sum of squared logsumexps of the logits (Chowdhery et al. 2022, PaLM,
    section 5), over predicted tokens: float32 [2]. On GPUs too: fla's fused kernel has no such sum."""

    def chunk_sums(states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = F.linear(states, weight, bias).float()
        normaliser = logits.logsumexp(-1)
        counted = labels != IGNORED
        wanted = logits.gather(-1, labels.clamp(min=0)[:, None])[:, 0]
        loss = torch.where(counted, normaliser - wanted, 0.0).sum()
        return torch.stack([loss, torch.where(counted, normaliser, 0.0).square().sum()])

    return _over_chunks(chunk_sums, states, labels)


def _over_chunks(
    sums: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], states: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """The sum of `sums(states, labels)` over chunks, whose logits are made again for the backward pass."""
    pairs = list(zip(states.split(CHUNK_TOKENS), labels.split(CHUNK_TOKENS), strict=True))
    if len(pairs) == 1:
        return sums(states, labels)
    parts = [cast("torch.Tensor", checkpoint(sums, s, target, use_reentrant=False)) for s, target in pairs]
    return torch.stack(parts).sum(0)


def token_losses(states: torch.Tensor, head: nn.Linear, labels: torch.Tensor) -> torch.Tensor:
    """The cross-entropy of each label, 0 where it is masked: float32 [n]. A `Reading`."""
    pairs = zip(states.split(CHUNK_TOKENS), labels.split(CHUNK_TOKENS), strict=True)
    parts = [
        F.cross_entropy(
            F.linear(part, head.weight, head.bias).float(), target, ignore_index=IGNORED, reduction="none"
        )
        for part, target in pairs
    ]
    return torch.cat(parts)


def fused_cross_entropy(
    states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor
) -> torch.Tensor:
    """The same through fla's Triton kernel, which never holds the logits of the whole batch."""
    from fla.modules.fused_linear_cross_entropy import (  # Triton: only where there is a GPU
        fused_linear_cross_entropy_loss,
    )

    loss: Any = fused_linear_cross_entropy_loss(
        states, cast("Any", labels), weight, bias, ignore_index=IGNORED, reduction="sum"
    )
    return loss.float()
