"""Recurrences that correct what the state holds, in plain PyTorch, over packed segments.

Chunked as `recurrence.py` is: within a chunk the corrections solve a triangular system.

Shapes: T tokens, N segments, H heads, K and V channels of a head, J chunks of C tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flame.models.recurrence import carry, chunked, decayed_scores


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    decay: Tensor,
    beta: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    initial: Tensor | None = None,
    erase: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = exp(decay_t) S_(t-1) + beta_t k_t (v_t - p_t^T R_t)^T, o_t = scale q_t S_t.

    Without `erase` p is k, and R_t, which it reads, the decayed state exp(decay_t) S_(t-1). `erase` is a p of
    its own, which reads S_(t-1) itself, as in fla's kernels for Comba (arXiv 2506.02475).
    The chunked form of arXiv 2412.06464, section 3.3: within a chunk (I + L) u = beta v and
    (I + L) w = beta p exp(read), L the strictly lower part of beta_i p_i k_j exp(read_i - total_j); total is
    the sum of decays up to a token, read that of R.
    q, k, erase: [T, H, K]; v: [T, H, V]; decay <= 0, beta: [T, H]; initial: [N, H, K, V].
    Returns o [T, H, V] and the last states [N, H, K, V], float32.
    """
    chunks = chunked(cu_seqlens)
    q, k, v = (chunks.spread(x.float()) for x in (q * scale, k, v))
    p = k if erase is None else chunks.spread(erase.float())
    decay, beta = (chunks.spread(x.float()[..., None]) for x in (decay, beta))
    total = decay.cumsum(-2)
    read = total if erase is None else total - decay
    end = total[..., -1:, :]
    later = torch.ones(chunks.size, chunks.size, dtype=torch.bool, device=q.device).triu()
    between = (total - total.mT).masked_fill(later.triu(1), float("-inf")).exp()
    reach = between if erase is None else (read - total.mT).masked_fill(later, float("-inf")).exp()
    lower = ((p * beta) @ k.mT) * reach
    right = torch.cat([v * beta, p * (beta * read.exp())], -1)
    solved = torch.linalg.solve_triangular(lower, right, upper=False, unitriangular=True)
    u, w = solved.split([v.shape[-1], k.shape[-1]], -1)
    kept = (k * (end - total).exp()).mT
    identity = torch.eye(k.shape[-1], device=q.device)
    entering, final = carry(chunks, identity * end.exp() - kept @ w, kept @ u, initial, torch.matmul)
    written = u - w @ entering
    scores = (q @ k.mT) * between
    return chunks.gather((q * total.exp()) @ entering + scores @ written), final


def diagonal_plus_low_rank(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    decay: Tensor,
    cu_seqlens: Tensor,
    scale: float,
    initial: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """S_t = (diag(exp(decay_t)) + b_t a_t^T) S_(t-1) + k_t v_t^T, o_t = scale q_t S_t.

    RWKV7 (arXiv 2503.14456, eq. 17); Kimi Delta Attention with a = k exp(decay), b = -beta k, k = beta k
    (arXiv 2510.26692, eq. 1). Within a chunk u_i = a_i S_(i-1) solves (I - L) u = A S_0 + M v, L and M the
    strictly lower products of a with b and with k, A_i = a_i exp(total_(i-1)).

    q, k, a, b, decay: [T, H, K]; v: [T, H, V]; decay <= 0; initial: [N, H, K, V].
    Returns o [T, H, V] and the last states [N, H, K, V], float32.
    """
    chunks = chunked(cu_seqlens)
    q, k, v, a, b, decay = (chunks.spread(x.float()) for x in (q * scale, k, v, a, b, decay))
    total = decay.cumsum(-2)
    before, end = total - decay, total[..., -1:, :]
    lower = -decayed_scores(a, b, before, total, strict=True)
    right = torch.cat([decayed_scores(a, k, before, total, strict=True) @ v, a * before.exp()], -1)
    solved = torch.linalg.solve_triangular(lower, right, upper=False, unitriangular=True)
    u, w = solved.split([v.shape[-1], a.shape[-1]], -1)
    kept = (end - total).exp()
    low_rank = (b * kept).mT
    diagonal = torch.diag_embed(end.squeeze(-2).exp())
    transition, update = diagonal + low_rank @ w, low_rank @ u + (k * kept).mT @ v
    entering, final = carry(chunks, transition, update, initial, torch.matmul)
    u = u + w @ entering
    out = (q * total.exp()) @ entering + decayed_scores(q, k, total, total) @ v
    return chunks.gather(out + decayed_scores(q, b, total, total) @ u), final
