"""fla's linear attention functions in plain PyTorch, on the recurrences of `recurrence.py`.

Each function has the name and the arguments of fla's; `cpu.py` puts them in its place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flame.models.recurrence import decaying_sum, gated_linear_attention, value_gated_attention
from flame.models.recurrence_delta import diagonal_plus_low_rank

States = Tensor | tuple[Tensor, ...] | None


def flat(x: Tensor) -> Tensor:
    """[B, T, ...] to [B T, ...]."""
    return x.flatten(0, 1)


def bounds_of(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """Segments of the flattened [B, T, ...]: those given, else one a row."""
    if cu_seqlens is not None:
        return cu_seqlens
    return torch.arange(0, x.shape[0] * x.shape[1] + 1, x.shape[1], device=x.device)


def scale_of(k: Tensor, scale: float | None) -> float:
    """The scale of the queries: 1 / sqrt(K) where none is given."""
    return float(k.shape[-1] ** -0.5) if scale is None else scale


def state_in(state: Tensor | None, v_first: bool) -> Tensor | None:
    """A caller's state as [N, H, K, V]."""
    return state.mT if state is not None and v_first else state


def state_out(state: Tensor, wanted: bool, v_first: bool) -> Tensor | None:
    """A state [N, H, K, V] as the caller wants it."""
    if not wanted:
        return None
    return state.mT.contiguous() if v_first else state


def chunk_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """fla's function of this name. q, k, g: [B, T, H, K]; v: [B, T, H, V]; states [N, H, K, V]."""
    scale = scale_of(k, scale)
    initial = state_in(initial_state, state_v_first)
    tensors = (flat(q), flat(k), flat(v), flat(g))
    out, final = gated_linear_attention(*tensors, bounds_of(q, cu_seqlens), scale, initial)
    return out.view(v.shape).to(v.dtype), state_out(final, bool(output_final_state), state_v_first)


def fused_recurrent_gla(
    q: Tensor, k: Tensor, v: Tensor, gk: Tensor, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """fla's function of this name, as its layer calls it: the same sums as `chunk_gla`."""
    return chunk_gla(q, k, v, gk, **kwargs)


def chunk_simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    state_v_first: bool = False,
    cu_seqlens: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """fla's function of this name: one decay a head. g: [B, T, H], or constant g_gamma: [H], or none."""
    decay = q.new_zeros(q.shape[:3]) if g is None else g
    if g_gamma is not None:
        decay = g_gamma.expand(q.shape[:3])
    return chunk_gla(
        q, k, v, decay[..., None], scale, initial_state, output_final_state, state_v_first, cu_seqlens
    )


def chunk_retention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """fla's function of this name: head h decays by 1 - 2^(-5 - h)."""
    heads = torch.arange(q.shape[2], device=q.device, dtype=torch.float32)
    gamma = (1 - torch.exp2(-5 - heads)).log()
    return chunk_simple_gla(
        q,
        k,
        v,
        None,
        gamma,
        scale,
        initial_state,
        output_final_state,
        cu_seqlens=cu_seqlens,
    )


def chunk_linear_attn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None = None,
    initial_state: States = None,
    output_final_state: bool = False,
    normalize: bool = True,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, States]:
    """fla's function of this name: no decay; with `normalize`, over q times the running sum of keys, whose
    state is [N, 1, H, K] beside the other."""
    state, sums = initial_state if isinstance(initial_state, tuple) else (initial_state, None)
    scale = scale_of(k, scale)
    o, final = chunk_simple_gla(q, k, v, None, None, scale, state, output_final_state, cu_seqlens=cu_seqlens)
    if not normalize:
        return o, final
    bounds = bounds_of(q, cu_seqlens)
    keys = flat(k).flatten(1)
    initial = None if sums is None else sums.flatten(1)
    total, last = decaying_sum(keys, torch.zeros_like(keys), bounds, initial)
    total, last = total.view(k.shape), last.view(-1, 1, *k.shape[2:])
    o = o / ((q * scale * total).sum(-1, keepdim=True) + 1e-10)
    return o, None if final is None else (final, last)


def chunk_rwkv6(
    r: Tensor,
    k: Tensor,
    v: Tensor,
    w: Tensor,
    u: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """fla's function of this name. r, k, w: [B, T, H, K]; v: [B, T, H, V]; u: [H, K]."""
    scale = scale_of(k, scale)
    tensors = (flat(r), flat(k), flat(v), flat(w))
    out, final = gated_linear_attention(*tensors, bounds_of(r, cu_seqlens), scale, initial_state, u)
    return out.view(v.shape).to(v.dtype), state_out(final, bool(output_final_state), False)


def chunk_rwkv7(
    r: Tensor,
    w: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    scale: float = 1.0,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """fla's function of this name. r, w, k, a, b: [B, T, H, K]; v: [B, T, H, V]."""
    tensors = (flat(r), flat(k), flat(v), flat(a), flat(b), flat(w))
    out, final = diagonal_plus_low_rank(*tensors, bounds_of(r, cu_seqlens), scale, initial_state)
    return out.view(v.shape).to(v.dtype), state_out(final, bool(output_final_state), False)


def fused_mul_recurrent_rwkv7(
    r: Tensor, w: Tensor, k: Tensor, v: Tensor, kk: Tensor, a: Tensor, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """fla's function of this name: `chunk_rwkv7` with a = -kk and b = kk a."""
    return chunk_rwkv7(r, w, k, v, -kk, kk * a, **kwargs)


def chunk_gsa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    s: Tensor,
    g: Tensor | None = None,
    scale: float | None = None,
    initial_state: tuple[Tensor, Tensor] | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """fla's function of this name. q, k: [B, T, H, K]; v: [B, T, H, V]; s, g: [B, T, H, slots].

    Two passes: queries read slots that hold keys, their softmax reads slots that hold values.
    """
    assert g is not None, "the layer gives its gate"
    scale = scale_of(k, scale)
    bounds = bounds_of(q, cu_seqlens)
    of_keys, of_values = (None, None) if initial_state is None else initial_state
    tensors = (flat(q), flat(k), flat(s), flat(g))
    read, keys = value_gated_attention(*tensors, bounds, scale, of_keys)
    tensors = (read.softmax(-1), flat(s), flat(v), flat(g))
    out, values = gated_linear_attention(*tensors, bounds, 1.0, of_values)
    return out.view(v.shape).to(v.dtype), (keys, values) if output_final_state else None


def chunk_hgrn(
    x: Tensor,
    g: Tensor,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """fla's function of this name, with segments too. x, g: [B, T, D]; states [N, D]."""
    out, final = decaying_sum(flat(x), flat(g), bounds_of(x, cu_seqlens), initial_state)
    return out.view(x.shape).to(x.dtype), state_out(final, bool(output_final_state), False)


def fused_additive_gate(
    x: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """fla's function of this name: with z the running log of the sum of exp(x) within a segment,
    exp(x - z), z_(t-1) - z_t (0 at first) and the last z [N, 1, H, K]. x: [B, T, H, K]."""
    lengths = bounds_of(x, cu_seqlens).diff().tolist()
    starts = [None] * len(lengths) if initial_state is None else list(initial_state)
    sums = []
    gates = []
    for part, start in zip(flat(x).float().split(lengths), starts, strict=True):
        extended = part if start is None else torch.cat([start.view(1, *part.shape[1:]), part])
        z = extended.logcumsumexp(0)
        before = torch.cat([z[:1], z[:-1]])
        sums.append(z[-len(part) :])
        gates.append((before - z)[-len(part) :])
    total, gate = torch.cat(sums), torch.cat(gates)
    k = (x - total.view(x.shape)).exp().to(x.dtype)
    return k, gate.view(x.shape).to(x.dtype), torch.stack([z[-1:] for z in sums])
