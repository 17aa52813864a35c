"""fla's norms, activations, rotary embedding, short convolution and token shift in plain PyTorch.

Each function has the name and the arguments of fla's; `cpu.py` puts them in its place.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

# ------------------------------------------------------------------------ norms and activations


def rms_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """fla's function of this name: [..., D]; with `prenorm` also the sum of `x` and `residual`."""
    total = x if residual is None else x + residual
    normed = F.rms_norm(total.float(), total.shape[-1:], None, eps)
    normed = normed if weight is None else normed * weight
    out = (normed if bias is None else normed + bias).to(x.dtype)
    if not prenorm:
        return out
    return out, total.float() if residual_in_fp32 else total


def rms_norm_gated(
    x: Tensor,
    g: Tensor,
    weight: Tensor | None,
    bias: Tensor | None = None,
    activation: str = "swish",
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, Tensor]:
    """fla's function of this name: the norm of `x`, times swish or sigmoid of the gate `g`."""
    gate = torch.sigmoid(g) if activation == "sigmoid" else F.silu(g)
    normed = rms_norm(x, weight, bias, residual, eps, prenorm, residual_in_fp32)
    if isinstance(normed, tuple):
        return normed[0] * gate, normed[1]
    return normed * gate


def swiglu(x: Tensor, y: Tensor) -> Tensor:
    """swish(x) * y."""
    return F.silu(x) * y


def swiglu_linear(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer on swish(x) * y."""
    return F.linear(F.silu(x) * y, weight, bias)


def rms_norm_linear(
    x: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    **options: Any,
) -> Tensor:
    """fla's function of this name: a linear layer on the norm of `x`."""
    normed = rms_norm(x, norm_weight, norm_bias, **options)
    assert isinstance(normed, Tensor)
    return F.linear(normed, linear_weight, linear_bias)


def rms_norm_swish_gate_linear(
    x: Tensor,
    g: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    linear_weight: Tensor,
    linear_bias: Tensor | None,
    **options: Any,
) -> Tensor:
    """fla's function of this name: a linear layer on the norm of `x` times swish of `g`."""
    normed = rms_norm_gated(x, g, norm_weight, norm_bias, **options)
    assert isinstance(normed, Tensor)
    return F.linear(normed, linear_weight, linear_bias)


def group_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
    num_groups: int = 1,
) -> Tensor | tuple[Tensor, Tensor]:
    """fla's function of this name: each of `num_groups` parts of the last dimension is normed alone."""
    total = x if residual is None else x + residual
    parts = total.float().unflatten(-1, (num_groups, -1))
    norm = F.rms_norm if is_rms_norm else F.layer_norm
    normed = norm(parts, parts.shape[-1:], eps=eps).flatten(-2)
    normed = normed if weight is None else normed * weight
    out = (normed if bias is None else normed + bias).to(x.dtype)
    if not prenorm:
        return out
    return out, total.float() if residual_in_fp32 else total


def layer_norm(*args: Any, **kwargs: Any) -> Tensor | tuple[Tensor, Tensor]:
    """fla's function of this name: the group norm of one group."""
    return group_norm(*args, **kwargs)


def rmsnorm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    z: Tensor | None = None,
    eps: float = 1e-6,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> Tensor:
    """fla's function of this name: the norm of groups of `x`, gated by swish of `z` before or after."""
    if z is not None and not norm_before_gate:
        x = x * F.silu(z)
    groups = 1 if group_size is None else x.shape[-1] // group_size
    normed = group_norm(x, weight, bias, eps=eps, is_rms_norm=True, num_groups=groups)
    assert isinstance(normed, Tensor)
    return normed * F.silu(z) if z is not None and norm_before_gate else normed


def l2norm(x: Tensor, eps: float = 1e-6, output_dtype: torch.dtype | None = None) -> Tensor:
    """fla's function of this name: [..., D] over its length."""
    normed = x.float() * (x.float().square().sum(-1, keepdim=True) + eps).rsqrt()
    return normed.to(output_dtype or x.dtype)


def elu_p1(x: Tensor) -> Tensor:
    """elu plus one, which is positive."""
    return (F.elu(x, 1.0, False) + 1.0).to(x)


def sqrelu(x: Tensor) -> Tensor:
    """The square of relu."""
    return F.relu(x).square()


# ------------------------------------------------------------------------------ rotary embedding


def rotary_embedding(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    chunk_indices: Tensor | None = None,
) -> Tensor:
    """fla's function of this name. x: [B, T, H, D]; cos, sin: [positions, D / 2]; positions restart at
    each segment and are moved by the offsets (an int, or one for each segment or row)."""
    at = _positions(x, cu_seqlens)
    if isinstance(seqlen_offsets, Tensor) and cu_seqlens is not None:
        at = at + torch.repeat_interleave(seqlen_offsets, cu_seqlens.diff())
    elif isinstance(seqlen_offsets, Tensor):
        at = at + seqlen_offsets[:, None]
    else:
        at = at + seqlen_offsets
    at = at.clamp(min=0)  # the padding to the left of a short row; nothing reads it
    cos, sin = cos[at][..., None, :], sin[at][..., None, :]
    turned, rest = x.split([2 * cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], -1)
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        turned = torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
    return torch.cat([turned, rest], -1) if rest.shape[-1] else turned


def _positions(x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """int64 [T]: the place of each token of x [B, T, ...] in its segment."""
    at = torch.arange(x.shape[1], device=x.device)
    if cu_seqlens is None:
        return at
    bounds = cu_seqlens.to(torch.int64)
    return at - torch.repeat_interleave(bounds[:-1], bounds.diff())


# ----------------------------------------------------------------------------- short convolution


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool | None = False,
    activation: str | None = None,
    backend: str | None = None,
    cu_seqlens: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor | None]:
    """fla's function of this name: a depthwise causal convolution within segments.

    x: [B, T, D], B = 1 with cu_seqlens; weight: [D, W]; states: [N, D, W], the last W inputs.
    """
    if cu_seqlens is not None and initial_state is not None:
        parts = [
            _convolved(part, weight, state[None])
            for part, state in zip(x.split(cu_seqlens.diff().tolist(), 1), initial_state, strict=True)
        ]
        out = torch.cat(parts, 1)
    elif cu_seqlens is not None:
        out = _convolved_packed(x, weight, _positions(x, cu_seqlens))
    else:
        out = _convolved(x, weight, initial_state)
    out = _finished(out, bias, activation, residual)
    if not output_final_state:
        return out, None
    rows = x.unbind(0) if cu_seqlens is None else x[0].split(cu_seqlens.diff().tolist())
    width = weight.shape[1]
    before = x.new_zeros(len(rows), x.shape[-1], width) if initial_state is None else initial_state
    states = [torch.cat([s.to(x.dtype), r.mT], 1)[:, -width:] for s, r in zip(before, rows, strict=True)]
    return out, torch.stack(states)


def _finished(out: Tensor, bias: Tensor | None, activation: str | None, residual: Tensor | None) -> Tensor:
    out = out if bias is None else out + bias
    out = F.silu(out) if activation in ("silu", "swish") else out
    return out if residual is None else out + residual


def _convolved(x: Tensor, weight: Tensor, state: Tensor | None) -> Tensor:
    """Rows x [B, T, D], each after its state [B, D, W] or after zeros."""
    width, length = weight.shape[1], x.shape[1]
    left = x.new_zeros(x.shape[0], width - 1, x.shape[2])
    if state is not None:
        left = state[..., 1:].mT.to(x.dtype)
    extended = torch.cat([left, x], 1)
    taps = [extended[:, i : i + length] * weight[:, i] for i in range(width)]
    return torch.stack(taps).sum(0)


def _convolved_packed(x: Tensor, weight: Tensor, at: Tensor) -> Tensor:
    """x [1, T, D]; a tap that would reach before the token's segment (positions `at`) is left out."""
    width = weight.shape[1]
    out = x * weight[:, -1]
    for back in range(1, min(width, x.shape[1])):
        inside = (at[back:] >= back).unsqueeze(-1)
        tap = x[:, :-back] * weight[:, -1 - back] * inside
        out = out + F.pad(tap, (0, 0, back, 0))
    return out


def causal_conv1d_update(
    x: Tensor,
    cache: Tensor,
    residual: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """fla's function of this name: one token of each of N sequences; `cache` [N, D, W] moves on in
    place."""
    assert weight is not None
    cache.copy_(torch.cat([cache[..., 1:], x.reshape(-1, x.shape[-1], 1).to(cache.dtype)], -1))
    out = (cache * weight).sum(-1).view(x.shape).to(x.dtype)
    return _finished(out, bias, activation, residual), cache


# ------------------------------------------------------------------------------------------ RWKV


def token_shift(
    x: Tensor,
    cu_seqlens: Tensor | None = None,
    cache: Tensor | None = None,
    output_cache: bool = False,
    chunk_indices: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """fla's function of this name: x_(t-1) - x_t within segments, x_(-1) from the cache, else 0.

    x: [B, T, D], B = 1 with cu_seqlens; cache: [N, D] or [N, 1, D]; returned as [N, 1, D].
    """
    before = F.pad(x, (0, 0, 1, -1)) if x.shape[1] > 1 else torch.zeros_like(x)
    states = None if cache is None else cache.reshape(-1, 1, x.shape[-1]).to(x.dtype)
    if cu_seqlens is None:
        last = x[:, -1:]
        if states is not None:
            before = torch.cat([states, before[:, 1:]], 1)
    else:
        bounds = cu_seqlens.to(torch.int64)
        last = x[0, bounds[1:] - 1].unsqueeze(1)
        first = torch.zeros(x.shape[1], 1, device=x.device).index_fill(0, bounds[:-1], 1.0).bool()
        before = before.masked_fill(first, 0.0)
        if states is not None:
            before = before.index_add(1, bounds[:-1], states.transpose(0, 1))
    return (before - x, last) if output_cache else before - x


def fused_addcmul_rwkv7(hidden_states: Tensor, delta: Tensor, *mixes: Tensor | None) -> tuple[Any, ...]:
    """fla's function of this name: hidden + delta * mix, for each mix."""
    mixed = [None if mix is None else torch.addcmul(hidden_states, delta, mix) for mix in mixes]
    return tuple(mixed)


def fused_k_rwkv7(k: Tensor, a: Tensor, ka: Tensor, *_: Any) -> Tensor:
    """fla's function of this name: k (1 + (a - 1) ka)."""
    return k.addcmul(k * (a - 1), ka)


def gate_output_correction(o: Tensor, r: Tensor, k: Tensor, r_k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """fla's function of this name: (o + (sum over channels of r k r_k) v) g. o, g: [B, T, H V]."""
    correction = (r * k * r_k).sum(-1, keepdim=True) * v
    return (o + correction.flatten(-2)) * g
