"""Cross-entropy over a vocabulary that lies on several ranks: no rank ever holds a whole row of logits."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flame.batch import IGNORED
from flame.parallel.exchange import Exchange

CHUNK_TOKENS = 4096  # logits of so many tokens are in memory at a time


def vocabulary_cross_entropy(
    exchange: Exchange, first: int, states: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor
) -> Tensor:
    """Summed cross-entropy of `states [n, d]` against `labels [n]`: a float32 scalar, the same on every rank.

    `weight [v, d]` and `bias [v]` are this rank's rows of the head, from row `first` of the whole on. The
    gradient of the states is this rank's part of a sum.
    """
    return vocabulary_sums(exchange, first, states, weight, bias, labels)[0]


def vocabulary_sums(
    exchange: Exchange, first: int, states: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor
) -> Tensor:
    """The same, and the sum of squared logsumexps of the logits, over predicted tokens: float32 [2]."""

    def chunk_sums(states: Tensor, labels: Tensor) -> Tensor:
        both = token_losses(exchange, first, F.linear(states, weight, bias), labels)
        losses, normalisers = (torch.where(labels != IGNORED, of_tokens, 0.0) for of_tokens in both)
        return torch.stack([losses.sum(), normalisers.square().sum()])

    pairs = list(zip(states.split(CHUNK_TOKENS), labels.split(CHUNK_TOKENS), strict=True))
    if len(pairs) == 1:
        return chunk_sums(states, labels)
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    parts = [cast("Tensor", checkpoint(chunk_sums, s, target, **options)) for s, target in pairs]
    return torch.stack(parts).sum(0)


def vocabulary_token_losses(
    exchange: Exchange, first: int, states: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor
) -> Tensor:
    """The cross-entropy of each label, 0 where it is masked, the same on every rank: float32 [n]."""
    pairs = zip(states.split(CHUNK_TOKENS), labels.split(CHUNK_TOKENS), strict=True)
    parts = [token_losses(exchange, first, F.linear(part, weight, bias), target)[0] for part, target in pairs]
    return torch.where(labels != IGNORED, torch.cat(parts), 0.0)


def token_losses(exchange: Exchange, first: int, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The cross-entropy of each token, and the logsumexp of its logits: float32 [n] each.

    `logits [n, v]` are of this rank's part of the vocabulary, which begins with the id `first`. Labels
    outside the vocabulary (`IGNORED`) give numbers without meaning. Two small reductions: the maxima, and
    with the sums of exponentials the labels' logits (Shoeybi et al., arXiv 1909.08053).
    """
    return cast("tuple[Tensor, Tensor]", _TokenLosses.apply(logits, labels, first, exchange))


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, first: int, exchange: Exchange
    ) -> tuple[Tensor, Tensor]:
        maxima = exchange.maxima(logits.amax(-1).float())
        shifted = logits.float() - maxima[:, None]
        own = labels - first
        mine = (own >= 0) & (own < logits.shape[-1])
        own = own.masked_fill(~mine, 0)
        wanted = shifted.gather(-1, own[:, None])[:, 0] * mine
        exponentials = shifted.exp_()
        sums = exchange.sums(torch.stack([exponentials.sum(-1), wanted]))
        normaliser = sums[0].log()
        ctx.save_for_backward(exponentials.div_(sums[0][:, None]), own, mine)
        ctx.dtype = logits.dtype
        return normaliser - sums[1], normaliser + maxima

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        of_loss, of_normaliser = gradients
        probabilities, own, mine = ctx.saved_tensors
        gradient = probabilities * (of_loss + of_normaliser)[:, None]
        gradient.scatter_add_(-1, own[:, None], -(of_loss * mine)[:, None])
        return gradient.to(ctx.dtype), None, None, None
