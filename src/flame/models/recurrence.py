"""Gated linear attention and the gated delta rule in plain PyTorch, over packed segments.

Both are chunked: each segment is cut into chunks (the last one padded), everything within a chunk is
matrix products over all chunks at once, and the states that enter the chunks come from a parallel scan
over chunks that restarts at each segment. Everything is differentiable, in float32; no state and no
gradient crosses from one segment into another.

Shapes: T tokens, N segments, H heads, K and V channels of a head, J chunks of C tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK = 32
SAFE_DECAY = 60.0  # exp(60) and sums of products with it are finite in float32


@dataclass(frozen=True, slots=True)
class Chunks:
    """How T tokens of N segments lie in J chunks of C slots."""

    slots: Tensor  # int64 [T]: where each token goes in the J * C slots
    segment: Tensor  # int64 [J]
    first: Tensor  # bool [J]: the segment's first chunk
    last: Tensor  # int64 [N]: each segment's last chunk
    count: int
    size: int

    def spread(self, x: Tensor) -> Tensor:
        """[T, H, D] to [J, H, C, D], zeros in the padding."""
        slots = x.new_zeros(self.count * self.size, *x.shape[1:]).index_copy(0, self.slots, x)
        return slots.view(self.count, self.size, *x.shape[1:]).transpose(1, 2)

    def gather(self, x: Tensor) -> Tensor:
        """[J, H, C, D] back to [T, H, D]."""
        return x.transpose(1, 2).flatten(0, 1).index_select(0, self.slots)


def chunked(cu_seqlens: Tensor, size: int = CHUNK) -> Chunks:
    """The chunks of segments with bounds `cu_seqlens` [N + 1]; `size` shrinks to the longest segment."""
    bounds = cu_seqlens.to(torch.int64)
    lengths = bounds.diff()
    size = min(size, int(lengths.max()))
    counts = (lengths + size - 1) // size
    ends = counts.cumsum(0)
    device = bounds.device
    segment_of_token = torch.repeat_interleave(torch.arange(len(lengths), device=device), lengths)
    offset = (ends - counts) * size - bounds[:-1]
    segment = torch.repeat_interleave(torch.arange(len(lengths), device=device), counts)
    number = torch.arange(len(segment), device=device)
    return Chunks(
        slots=torch.arange(len(segment_of_token), device=device) + offset[segment_of_token],
        segment=segment,
        first=number == (ends - counts)[segment],
        last=ends - 1,
        count=len(segment),
        size=size,
    )


def scan(transition: Tensor, update: Tensor, apply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """States s_j = transition_j s_(j-1) + update_j for all j, s_(-1) = 0: odd and even steps are paired,
    the pairs scanned, the even states filled in. `apply(a, s)` is the product."""
    steps = update.shape[0]
    if steps == 1:
        return update
    if steps % 2:
        states = scan(transition[:-1], update[:-1], apply)
        return torch.cat([states, apply(transition[-1:], states[-1:]) + update[-1:]])
    even_a, odd_a = transition.unflatten(0, (-1, 2)).unbind(1)
    even_b, odd_b = update.unflatten(0, (-1, 2)).unbind(1)
    odd = scan(apply(odd_a, even_a), apply(odd_a, even_b) + odd_b, apply)
    even = torch.cat([even_b[:1], apply(even_a[1:], odd[:-1]) + even_b[1:]])
    return torch.stack([even, odd], 1).flatten(0, 1)


def _carry(
    chunks: Chunks,
    transition: Tensor,
    update: Tensor,
    initial: Tensor | None,
    apply: Callable[[Tensor, Tensor], Tensor],
) -> tuple[Tensor, Tensor]:
    """The state [J, H, K, V] that enters each chunk, and each segment's last state [N, H, K, V]."""
    first = chunks.first.view(-1, 1, 1, 1)
    entering = None if initial is None else initial.float()[chunks.segment] * first
    if entering is not None:
        update = update + apply(transition, entering)
    states = scan(transition * ~first, update, apply)
    before = torch.cat([torch.zeros_like(states[:1]), states[:-1]]) * ~first
    return before if entering is None else before + entering, states[chunks.last]


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    initial: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = diag(exp(decay_t)) S_(t-1) + k_t v_t^T, o_t = scale q_t S_t (arXiv 2312.06635, eq. 4).

    q, k, decay: [T, H, K]; v: [T, H, V]; decay <= 0; initial: [N, H, K, V].
    Returns o [T, H, V] and the last states [N, H, K, V], float32.
    """
    chunks = chunked(cu_seqlens)
    q, k, v, decay = (chunks.spread(x.float()) for x in (q * scale, k, v, decay))
    total = decay.cumsum(-2)
    end = total[..., -1:, :]
    update = (k * (end - total).exp()).mT @ v
    entering, final = _carry(chunks, end.exp().mT, update, initial, torch.mul)
    scores = _decayed_scores(q, k, total)
    return chunks.gather((q * total.exp()) @ entering + scores @ v), final


def _decayed_scores(q: Tensor, k: Tensor, total: Tensor) -> Tensor:
    """sum over channels of q_i k_j exp(total_i - total_j) for i >= j, else 0: [J, H, C, C].

    As one product of q exp(total) and k exp(-total) where the second cannot overflow, else channel by
    channel: `total` falls without bound when a gate closes.
    """
    size = q.shape[-2]
    future = torch.ones(size, size, dtype=torch.bool, device=q.device).triu(1)
    if float(total.detach().amin()) > -SAFE_DECAY:
        return ((q * total.exp()) @ (k * (-total).exp()).mT).masked_fill(future, 0.0)
    between = total[..., :, None, :] - total[..., None, :, :]
    weight = between.masked_fill(future[..., None], float("-inf")).exp()
    return ((weight * k[..., None, :, :]) @ q[..., None]).squeeze(-1)


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    initial: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = exp(decay_t) (I - beta_t k_t k_t^T) S_(t-1) + beta_t k_t v_t^T, o_t = scale q_t S_t.

    The chunked form of arXiv 2412.06464, section 3.3: within a chunk (I + L) u = beta v and
    (I + L) w = beta k exp(total), L the strictly lower part of beta_i k_i k_j exp(total_i - total_j).
    q, k: [T, H, K]; v: [T, H, V]; decay <= 0, beta: [T, H]; initial: [N, H, K, V].
    Returns o [T, H, V] and the last states [N, H, K, V], float32.
    """
    chunks = chunked(cu_seqlens)
    q, k, v = (chunks.spread(x.float()) for x in (q * scale, k, v))
    decay, beta = (chunks.spread(x.float()[..., None]) for x in (decay, beta))
    total = decay.cumsum(-2)
    end = total[..., -1:, :]
    future = torch.ones(chunks.size, chunks.size, dtype=torch.bool, device=q.device).triu(1)
    between = (total - total.mT).masked_fill(future, float("-inf")).exp()
    lower = ((k * beta) @ k.mT) * between
    right = torch.cat([v * beta, k * (beta * total.exp())], -1)
    solved = torch.linalg.solve_triangular(lower, right, upper=False, unitriangular=True)
    u, w = solved.split([v.shape[-1], k.shape[-1]], -1)
    kept = (k * (end - total).exp()).mT
    identity = torch.eye(k.shape[-1], device=q.device)
    entering, final = _carry(chunks, identity * end.exp() - kept @ w, kept @ u, initial, torch.matmul)
    written = u - w @ entering
    scores = (q @ k.mT) * between
    return chunks.gather((q * total.exp()) @ entering + scores @ written), final
