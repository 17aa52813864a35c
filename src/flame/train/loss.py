"""The loss: next-token cross-entropy, summed over predicted tokens. It belongs to the trainer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from flame.batch import IGNORED, Batch
from flame.parallel.exchange import Exchange
from flame.parallel.vocabulary import vocabulary_cross_entropy, vocabulary_sums, vocabulary_token_losses

CHUNK_TOKENS = 4096  # logits of so many tokens are in memory at a time, on CPU

# What is made of the states before the head, [n, d], the head, and the labels, [n]
Reading = Callable[[torch.Tensor, nn.Linear, torch.Tensor], torch.Tensor]
# states [n, d], the head's weight and bias, labels [n]
OfStates = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor], torch.Tensor]
HiddenStates = Callable[[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]


class LossModule(nn.Module):
    """A guest model with its loss inside `forward`, so that FSDP's hooks surround both.

    `hidden` gives the states before the head, [b, L, d]; `head` is the guest's output projection.
    """

    def __init__(
        self,
        guest: nn.Module,
        hidden: HiddenStates,
        head: nn.Linear | None,
        z_loss: float = 0.0,
        *,
        backward_twice: bool = False,
    ) -> None:
        """`head`: None in a part of a model that ends before it, and has no loss.
        `z_loss`: a penalty of so many times the square of each logsumexp of the logits, in training.
        `backward_twice`: a backward pass goes through the same loss more than once."""
        super().__init__()
        self._backward_twice = backward_twice
        self.guest = guest
        self._hidden = hidden
        self.z_loss = z_loss
        self._penalties: list[torch.Tensor] = []  # since they were last taken
        object.__setattr__(self, "_head", head)  # a part of the guest already: not registered twice
        self._losses = WHOLE

    @property
    def head(self) -> nn.Linear | None:
        """The guest's output projection; None in a part without one."""
        return cast("nn.Linear | None", self._head)

    def states(self, batch: Batch) -> torch.Tensor:
        """The guest's states before the head, [b, L, d]."""
        # a bound that is nearly always the same: compiled blocks take it for a constant
        longest = 1 << (batch.longest_segment - 1).bit_length()
        return self._hidden(self.guest, batch.tokens, batch.positions, batch.cu_seqlens, longest)

    def forward(self, batch: Batch, read: Reading | None = None) -> torch.Tensor:
        """The sum of cross-entropy over the batch's predicted tokens: a float32 scalar. With `z_loss` its
        gradient is that of cross-entropy and penalty; `take_penalty` has the penalty's value. `read`: what
        it makes of the same states instead."""
        states = self.states(batch)
        head = cast("nn.Linear", self._head)
        flat, labels = states.reshape(-1, states.shape[-1]), batch.labels.reshape(-1)
        if read is not None:
            return read(flat, head, labels)
        with unpacked_copies() if self._backward_twice and flat.is_cuda else nullcontext():
            if self.z_loss and torch.is_grad_enabled():
                loss, squares = self._losses.total_and_squares(flat, head.weight, head.bias, labels)
                penalty = self.z_loss * squares
                self._penalties.append(penalty.detach())
                return loss + (penalty - penalty.detach())
            return self._losses.total(flat, head.weight, head.bias, labels)

    def token_losses(self, states: torch.Tensor, head: nn.Linear, labels: torch.Tensor) -> torch.Tensor:
        """The cross-entropy of each label, 0 where it is masked: float32 [n]. A `Reading`."""
        return self._losses.of_tokens(states, head.weight, head.bias, labels)

    def take_penalty(self) -> torch.Tensor | None:
        """The penalty over the micro-batches since it was last taken, a float64 scalar; None without one."""
        taken, self._penalties = self._penalties, []
        return torch.stack(taken).double().sum() if taken else None

    def divide_vocabulary(self, exchange: Exchange) -> None:
        """The head's weights, divided already, are this rank's part of the vocabulary."""
        if self.head is None:
            return
        first = exchange.rank * -(-self.head.out_features // exchange.size)
        self._losses = Losses(
            partial(vocabulary_cross_entropy, exchange, first),
            partial(vocabulary_sums, exchange, first),
            partial(vocabulary_token_losses, exchange, first),
        )


def cross_entropy(
    states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor
) -> torch.Tensor:
    """Summed cross-entropy of `states [n, d] @ weight.T` against `labels [n]`, by the device."""
    function = fused_cross_entropy if states.is_cuda else chunked_cross_entropy
    return function(states, weight, bias, labels)


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


def token_losses(
    states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor
) -> torch.Tensor:
    """The cross-entropy of each label, 0 where it is masked: float32 [n]."""
    pairs = zip(states.split(CHUNK_TOKENS), labels.split(CHUNK_TOKENS), strict=True)
    parts = [
        F.cross_entropy(F.linear(part, weight, bias).float(), target, ignore_index=IGNORED, reduction="none")
        for part, target in pairs
    ]
    return torch.cat(parts)


def unpacked_copies() -> saved_tensors_hooks:
    """Within, a backward pass gets copies of what a forward pass saved. fla's fused loss saves its gradients
    and scales them in place: the second time it would scale them again."""
    return saved_tensors_hooks(_as_it_is, torch.clone)


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


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


@dataclass(frozen=True, slots=True)
class Losses:
    """The loss in its forms, on a head that lies on one rank or on several."""

    total: OfStates  # summed: a float32 scalar
    total_and_squares: OfStates  # and the sum of squared logsumexps: float32 [2]
    of_tokens: OfStates  # of each, 0 where it is masked: float32 [n]


WHOLE = Losses(cross_entropy, cross_entropy_and_squares, token_losses)
