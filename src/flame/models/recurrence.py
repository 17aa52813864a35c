"""Recurrences with a diagonal transition in plain PyTorch, over packed segments.

The attention-like ones are chunked: each segment is cut into chunks (the last one padded), everything
within a chunk is matrix products over all chunks at once, and the states that enter the chunks come from a
parallel scan over chunks that restarts at each segment. Everything is differentiable, in float32; no state
and no gradient crosses from one segment into another.

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


def carry(
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
    bonus: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = diag(exp(decay_t)) S_(t-1) + k_t v_t^T, o_t = scale q_t S_t (arXiv 2312.06635, eq. 4).

    With `bonus` u [H, K], o_t = scale q_t (S_(t-1) + diag(u) k_t v_t^T): a token reads the state before its
    own decay and weighs itself apart (RWKV6, arXiv 2404.05892, eq. 19).

    q, k: [T, H, K]; v: [T, H, V]; decay <= 0: [T, H, K], or [T, H, 1] for one a head; initial: [N, H, K, V].
    Returns o [T, H, V] and the last states [N, H, K, V], float32.
    """
    chunks = chunked(cu_seqlens)
    q, k, v, decay = (chunks.spread(x.float()) for x in (q * scale, k, v, decay))
    total = decay.cumsum(-2)
    end = total[..., -1:, :]
    update = (k * (end - total).exp()).mT @ v
    entering, final = carry(chunks, end.exp().mT, update, initial, torch.mul)
    if bonus is None:
        scores = decayed_scores(q, k, total, total)
        return chunks.gather((q * total.exp()) @ entering + scores @ v), final
    before = total - decay
    scores = decayed_scores(q, k, before, total, strict=True)
    own = (q * k * bonus.float()[:, None]).sum(-1, keepdim=True)
    return chunks.gather((q * before.exp()) @ entering + scores @ v + own * v), final


def value_gated_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    initial: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = S_(t-1) diag(exp(decay_t)) + k_t v_t^T, o_t = scale q_t S_t: the value channels decay.

    The first pass of gated slot attention (arXiv 2409.07146, section 3.1). q, k: [T, H, K];
    v, decay: [T, H, V]; initial: [N, H, K, V]. Returns o [T, H, V] and the last states, float32.
    """
    chunks = chunked(cu_seqlens)
    q, k, v, decay = (chunks.spread(x.float()) for x in (q * scale, k, v, decay))
    total = decay.cumsum(-2)
    end = total[..., -1:, :]
    entering, final = carry(chunks, end.exp(), k.mT @ (v * (end - total).exp()), initial, torch.mul)
    scores = (q @ k.mT).tril()
    if float(total.detach().amin()) > -SAFE_DECAY:
        within = total.exp() * (scores @ (v * (-total).exp()))
    else:
        future = torch.ones_like(scores, dtype=torch.bool).triu(1)[..., None]
        between = total[..., :, None, :] - total[..., None, :, :]
        weight = scores[..., None] * between.masked_fill(future, float("-inf")).exp()
        within = (weight * v[..., None, :, :]).sum(-2)
    return chunks.gather(total.exp() * (q @ entering) + within), final


def decayed_scores(q: Tensor, k: Tensor, total_q: Tensor, total_k: Tensor, *, strict: bool = False) -> Tensor:
    """sum over channels of q_i k_j exp(total_q_i - total_k_j) for i >= j (`strict`: i > j), else 0.

    q, k: [J, H, C, K]; the totals as wide, or [J, H, C, 1] for one decay a head. Returns [J, H, C, C]. With
    a total for each channel as one product of q exp(total_q) and k exp(-total_k) where the
    second cannot overflow, else channel by channel: the totals fall without bound when a gate closes.
    """
    size = q.shape[-2]
    ones = torch.ones(size, size, dtype=torch.bool, device=q.device)
    future = ones.triu(0 if strict else 1)
    if total_k.shape[-1] == 1:
        return (q @ k.mT) * (total_q - total_k.mT).masked_fill(future, float("-inf")).exp()
    if float(total_k.detach().amin()) > -SAFE_DECAY:
        return ((q * total_q.exp()) @ (k * (-total_k).exp()).mT).masked_fill(future, 0.0)
    between = total_q[..., :, None, :] - total_k[..., None, :, :]
    weight = between.masked_fill(future[..., None], float("-inf")).exp()
    return ((weight * k[..., None, :, :]) @ q[..., None]).squeeze(-1)


def decaying_sum(
    x: Tensor, decay: Tensor, cu_seqlens: Tensor, initial: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """h_t = exp(decay_t) h_(t-1) + x_t, element by element (HGRN, arXiv 2311.04823, eq. 7).

    x, decay: [T, D]; initial: [N, D]. Returns h [T, D] and each segment's last [N, D], float32.
    """
    bounds = cu_seqlens.to(torch.int64)
    starts = bounds[:-1]
    transition, x = decay.float().exp(), x.float()
    if initial is not None:
        x = x.index_add(0, starts, transition[starts] * initial.float())
    kept = torch.ones(len(x), 1, device=x.device).index_fill(0, starts, 0.0)
    states = scan(transition * kept, x, torch.mul)
    return states, states[bounds[1:] - 1]
