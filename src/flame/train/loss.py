"""The loss: next-token cross-entropy, summed over predicted tokens. It belongs to the trainer."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from flame.batch import IGNORED, Batch

CHUNK_TOKENS = 4096  # logits of so many tokens are in memory at a time, on CPU

HiddenStates = Callable[[nn.Module, torch.Tensor, torch.Tensor, torch.Tensor, int], torch.Tensor]


class LossModule(nn.Module):
    """A guest model with its loss inside `forward`, so that FSDP's hooks surround both.

    `hidden` gives the states before the head, [b, L, d]; `head` is the guest's output projection.
    """

    def __init__(
        self, guest: nn.Module, hidden: HiddenStates, head: nn.Linear, *, backward_twice: bool = False
    ) -> None:
        """`backward_twice`: a backward pass goes through the same loss more than once."""
        super().__init__()
        self._backward_twice = backward_twice
        self.guest = guest
        self._hidden = hidden
        object.__setattr__(self, "_head", head)  # a part of the guest already: not registered twice

    def states(self, batch: Batch) -> torch.Tensor:
        """The guest's states before the head, [b, L, d]."""
        # a bound that is nearly always the same: compiled blocks take it for a constant
        longest = 1 << (batch.longest_segment - 1).bit_length()
        return self._hidden(self.guest, batch.tokens, batch.positions, batch.cu_seqlens, longest)

    def forward(self, batch: Batch) -> torch.Tensor:
        """The sum of cross-entropy over the batch's predicted tokens: a float32 scalar."""
        states = self.states(batch)
        head = cast("nn.Linear", self._head)
        flat, labels = states.reshape(-1, states.shape[-1]), batch.labels.reshape(-1)
        if flat.is_cuda:
            with unpacked_copies() if self._backward_twice else nullcontext():
                return fused_cross_entropy(flat, head.weight, head.bias, labels)
        return chunked_cross_entropy(flat, head.weight, head.bias, labels)


def chunked_cross_entropy(
    states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor
) -> torch.Tensor:
    """Summed cross-entropy of `states [n, d] @ weight.T` against `labels [n]`, a chunk at a time."""

    def chunk_loss(states: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = F.linear(states, weight, bias).float()
        return F.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")

    pairs = list(zip(states.split(CHUNK_TOKENS), labels.split(CHUNK_TOKENS), strict=True))
    if len(pairs) == 1:
        return chunk_loss(states, labels)
    losses = [
        cast("torch.Tensor", checkpoint(chunk_loss, s, target, use_reentrant=False)) for s, target in pairs
    ]
    return torch.stack(losses).sum()


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
