"""fla's delta rules in plain PyTorch, on the recurrences of `recurrence_delta.py`.

Each function has the name and the arguments of fla's; `cpu.py` puts them in its place.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flame.models.cpu_linear import bounds_of, flat, scale_of, state_in, state_out
from flame.models.cpu_modules import l2norm
from flame.models.recurrence_delta import diagonal_plus_low_rank, gated_delta_rule


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,  # fla's name
    dt_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """fla's function of this name. q, k: [B, T, H, K]; v: [B, T, HV, V]; g, beta: [B, T, HV]."""
    scale = scale_of(k, scale)
    g, beta = g.float(), beta.float()
    q, k = _queries_and_keys(q, k, v, use_qk_l2norm_in_kernel)
    if use_beta_sigmoid_in_kernel:
        beta = beta.sigmoid() * (2.0 if allow_neg_eigval else 1.0)
    if use_gate_in_kernel:
        assert A_log is not None
        g = -A_log.float().exp() * F.softplus(g if dt_bias is None else g + dt_bias.float())
    initial = state_in(initial_state, state_v_first)
    tensors = (flat(q), flat(k), flat(v), flat(g), flat(beta))
    out, final = gated_delta_rule(*tensors, bounds_of(v, cu_seqlens), scale, initial)
    return out.view(v.shape).to(v.dtype), state_out(final, bool(output_final_state), state_v_first)


def _queries_and_keys(q: Tensor, k: Tensor, v: Tensor, normed: bool) -> tuple[Tensor, Tensor]:
    """q, k: [B, T, H, K] in float32, normed where asked, to the heads of v: [B, T, HV, K]."""
    q, k = q.float(), k.float()
    if normed:
        q, k = l2norm(q), l2norm(k)
    shared = v.shape[2] // q.shape[2]
    return (q.repeat_interleave(shared, 2), k.repeat_interleave(shared, 2)) if shared > 1 else (q, k)


def chunk_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """fla's function of this name: the gated delta rule without a gate."""
    return chunk_gated_delta_rule(q, k, v, torch.zeros_like(beta), beta, **kwargs)


def chunk_gated_delta_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    num_householder: int,
    cu_seqlens: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """fla's function of this name: n delta steps a token. q: [B, T, H, K]; g: [B, T, H];
    k, v, beta: [B, T n, H, ...]. The gate is the first step's, the query the last one's."""
    n = num_householder
    first = torch.zeros(n, device=q.device).index_fill(0, torch.tensor(0, device=q.device), 1.0)
    last = first.flip(0)
    gate = beta.new_zeros(beta.shape) if g is None else (g[:, :, None] * first[:, None]).flatten(1, 2)
    query = (q[:, :, None] * last[:, None, None]).flatten(1, 2)
    bounds = None if cu_seqlens is None else cu_seqlens * n
    out, state = chunk_gated_delta_rule(query, k, v, gate, beta, cu_seqlens=bounds, **kwargs)
    return out[:, n - 1 :: n], state


def fused_recurrent_gated_delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, beta: Tensor, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """fla's function of this name, as its layers call it: g may be None."""
    return chunk_gated_delta_rule(q, k, v, torch.zeros_like(beta) if g is None else g, beta, **kwargs)


def chunk_comba(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """fla's function of this name. q, k, p: [B, T, H, K]; v: [B, T, H, V]; g, beta: [B, T, H]."""
    scale = scale_of(k, scale)
    if use_qk_l2norm_in_kernel:
        q, k, p = l2norm(q), l2norm(k), l2norm(p)
    tensors = (flat(q), flat(k), flat(v), flat(g), flat(beta))
    out, final = gated_delta_rule(*tensors, bounds_of(v, cu_seqlens), scale, initial_state, flat(p))
    return out.view(v.shape).to(v.dtype), state_out(final, bool(output_final_state), False)


def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
    state_v_first: bool = False,
    A_log: Tensor | None = None,  # fla's name
    dt_bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """fla's function of this name. q, k: [B, T, H, K]; v: [B, T, HV, V]; g: [B, T, HV, K];
    beta: [B, T, HV]."""
    scale = scale_of(k, scale)
    g, beta = g.float(), beta.float()
    q, k = _queries_and_keys(q, k, v, use_qk_l2norm_in_kernel)
    if use_beta_sigmoid_in_kernel:
        beta = beta.sigmoid() * (2.0 if allow_neg_eigval else 1.0)
    if use_gate_in_kernel:
        g = _kda_gate(g, A_log, dt_bias, lower_bound)
    written = k * beta[..., None]
    tensors = (flat(q), flat(written), flat(v), flat(k * g.exp()), flat(-written), flat(g))
    initial = state_in(initial_state, state_v_first)
    out, final = diagonal_plus_low_rank(*tensors, bounds_of(v, cu_seqlens), scale, initial)
    return out.view(v.shape).to(v.dtype), state_out(final, bool(output_final_state), state_v_first)


def _kda_gate(g: Tensor, a_log: Tensor | None, dt_bias: Tensor | None, lower_bound: float | None) -> Tensor:
    """-exp(A) softplus(g + bias), or lower_bound sigmoid(exp(A) (g + bias)). g: [B, T, HV, K]."""
    assert a_log is not None
    rate = a_log.float().exp().view(-1, 1)
    biased = g if dt_bias is None else g + dt_bias.float().view(g.shape[2:])
    if lower_bound is not None:
        return lower_bound * torch.sigmoid(rate * biased)
    return -rate * F.softplus(biased)
